#include "daemon/serve/request.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct request *request_new(void)
{
    return calloc(1, sizeof(struct request));
}

struct request *request_free(struct request *request)
{
    if (!request)
        return NULL;
    stream_done(&request->stream);
    free(request->text);
    free(request->wanted_name);
    free(request->ids);
    free(request->stops);
    free(request->vector);
    free(request->sentence);
    free(request);
    return NULL;
}

void request_fail(struct request *request, enum wire_code code, const char *format, ...)
{
    va_list ap;

    if (request->reason == END_ERROR)
        return;
    request->reason = END_ERROR;
    request->code = code;
    va_start(ap, format);
    if (vasprintf(&request->sentence, format, ap) < 0)
        request->sentence = NULL;
    va_end(ap);
}
