"""A run's folder, back as the method that was trained there.

Runs are the experiment's (fewshot/run.py) and are only read here: config, names, learned tensors.
"""

from clip_min import CLIP, UserError, weights
from clip_min.errors import nearest
from fewshot.run import Run
from methods import METHODS, BaseSettings, Method
from methods.wise_ft import keep_share


def described(run: Run) -> tuple[type[Method], BaseSettings]:
    """The method and the settings that a run's config.json names."""
    name = nearest(f"{run.path}/config.json: method", run.config["method"], METHODS)
    try:
        return METHODS[name], METHODS[name].Settings(**run.config["settings"])
    except UserError as error:
        raise UserError(f"{run.path}/config.json: settings: {error}") from None
    except TypeError as error:
        raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None


def trained(run: Run, clip: CLIP, template: str = "", share: float | None = None) -> Method:
    """The method as it was after its training, for the classes it learned from.

    clip: the one it was trained on. template: if not the run's own. share: how much of what it
    learned is kept (methods/wise_ft.py); None: all of it, of any method.
    """
    run.check_model(weights.fingerprint(clip))
    method_class, settings = described(run)
    method = method_class(clip, run.learned, template or run.template, settings)
    state = run.load_adapter()
    try:
        method.load_adapter(state)
    except UserError as error:
        raise UserError(f"{run.path}: {error}") from None
    if share is not None:
        method.load_adapter(keep_share(method, state, share))
    return method
