"""Load a run folder as the trained method.

Runs belong to the experiment (fewshot/run.py). This file only reads config, names and learned
tensors.
"""

from clip_min import CLIP, UserError, weights
from clip_min.errors import unknown
from fewshot.run import Run
from methods import METHODS, BaseSettings, Method
from methods.wise_ft import keep_share


def described(run: Run) -> tuple[type[Method], BaseSettings]:
    """The method and its settings, from a run's config.json."""
    name = run.config["method"]
    if name not in METHODS:
        raise unknown(f"{run.path}/config.json: method", name, METHODS)
    try:
        return METHODS[name], METHODS[name].Settings(**run.config["settings"])
    except UserError as error:
        raise UserError(f"{run.path}/config.json: settings: {error}") from None
    except TypeError as error:
        raise UserError(f"{run.path}/config.json: not a config of a run ({error})") from None


def trained(run: Run, clip: CLIP, template: str = "", share: float | None = None) -> Method:
    """The method after training, for the classes it learned from.

    clip: the model it was trained on. template: replaces the run's own. share: the share of the
    learned change to keep (methods/wise_ft.py); None: all, for any method.
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
