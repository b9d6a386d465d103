"""A small model made on the spot, and a daemon that has it ready."""


def made_model(t, name="made", *flags):
    path = t.dir / f"{name}.gguf"
    t.run("make-model", "--out", path, "--dim", "64", "--layers", "2", "--heads", "4",
          "--kv-heads", "2", "--ff", "128", "--vocab", "400", "--context", "8192",
          "--type", "f16", *flags)
    return path


def ready_daemon(t, **more):
    d = t.daemon(models=[made_model(t)], **more)
    d.hearth("warm", "--wait", "made")
    return d
