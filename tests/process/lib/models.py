"""Small models made on the spot, and a daemon that has one ready."""


def made_model(t, name="made", *flags):
    path = t.dir / f"{name}.gguf"
    t.run("make-model", "--out", path, "--dim", "64", "--layers", "2", "--heads", "4",
          "--kv-heads", "2", "--ff", "128", "--vocab", "400", "--context", "8192",
          "--type", "f16", *flags)
    return path


def slow_model(t, name="slow", *flags):
    """One whose steps and loads take long enough to meet it in the middle."""
    return made_model(t, name, "--dim", "256", "--layers", "4", "--ff", "1024", *flags)


def made_models(t, *names):
    """Models that count in a budget, of one size and different texts."""
    return [made_model(t, name, "--ff", "2048", "--vocab", "3000", "--type", "f32", "--seed", str(seed))
            for seed, name in enumerate(names)]


def ready_daemon(t, **more):
    d = t.daemon(models=[made_model(t)], **more)
    d.hearth("warm", "--wait", "made")
    return d
