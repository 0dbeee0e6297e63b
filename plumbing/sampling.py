"""
Find the guidance group that the options of a script ask for.
"""
from configurator import require


def find_group(config, model, checkpoint):
    """Return the number of the group that config.group names, or model.no_group where it names none.

    config: options with out_dir, group, guidance and steps. Raises UserError where the checkpoint's model
    cannot do what these options ask for.
    """
    steps = config.steps
    names = checkpoint["data"]["group_names"]
    known = ", ".join(names)
    if model.path is None:
        no_path = f"{config.out_dir} holds a trunk without a path"
        require(steps == 1, f"{no_path}, which has only --steps=1, not {steps}; train a path on it: "
                f"python train.py --trunk={config.out_dir}/best.pt "
                f"--data_dir={checkpoint['config']['data_dir']} --out_dir=out/l2d")
        require(not config.group, f"{no_path}, which knows no group={config.group!r}; leave it out")
    require(config.group in ("", *names),
            f"group={config.group!r}, but the groups of {config.out_dir} are: {known}")
    if config.guidance != 1:
        require(config.group, f"guidance={config.guidance} needs a --group: one of {known}")
        require(steps > 2, f"guidance={config.guidance} acts through x_t and needs --steps=3 or more, not "
                f"{steps}: the last evaluation reads the group alone")
    if not config.group:
        return model.no_group
    require(steps > 1, f"group={config.group!r} does nothing at steps=1, which is the trunk alone; use "
            "--steps=2 or more")
    return names.index(config.group)
