"""How a flow map starts from the weights of another model: exactly where r = t, or only as an initialisation."""

import re
from typing import Any

import torch
from torch import Tensor

OUTPUT_LAYER = re.compile(r"model\.(dec\.\d+x\d+_aux_conv|out_conv|last|last_2)(\.linear)?\.(weight|bias)")
# Weights (E, K C) that read the embeddings of K numbers, side by side; and those (K C, ...) of what is added to them.
INPUTS = ("model.map_layer0.weight", "model.emb_noise.weight")
OUTPUTS = ("model.map_label.weight", "model.map_label.bias", "model.map_augment.weight")
MINUS = ("trigflow", "flow")  # preconditionings whose network has the other sign than EDM's


def turn(weights: dict[str, Tensor], there: str, here: str) -> None:
    """Between preconditionings the output changes its sign: F of TrigFlow is minus F of EDM, and a velocity of its."""
    if (there in MINUS) != (here in MINUS):
        for name in filter(OUTPUT_LAYER.fullmatch, weights):
            weights[name] = -weights[name]


def fit(model: torch.nn.Module, weights: dict[str, Tensor], there: Any) -> None:
    """Bring weights of the network settings `there` into the shape of a model that is told more or has two heads.

    What the model alone is told has no effect at the start (but in a DiT with prefix tokens), and the second head is a
    copy of the first. What does not fit is left for the caller to find.
    """
    own = model.state_dict()
    told, tells = _told(there), _told(model)
    place = {i: told.index(name) for i, name in enumerate(tells) if name in told}
    place.setdefault(0, 0)  # t - r reads what t did, where it is told alone
    for name in filter(own.__contains__, (*INPUTS, *OUTPUTS)):
        dim = 1 if name in INPUTS else 0
        size = own[name].shape[dim] // len(tells)
        same = dim == 0 and name in weights and own[name].shape == weights[name].shape  # they are not in such parts
        if name in weights and not same and weights[name].shape[dim] == size * len(told):
            new = own[name] if dim == 0 else torch.zeros_like(own[name])
            if "emb_noise" in name:  # EDM2 reads it by the root mean square of its rows, zeros included
                weights[name] = weights[name] * (len(tells) / len(told)) ** 0.5
            old, new = weights[name].split(size, dim), new.split(size, dim)
            weights[name] = torch.cat([old[place[i]] if i in place else new[i] for i in range(len(tells))], dim)
    _fit_parts(own, weights, place)
    if getattr(model, "heads", 1) == 2:
        _second_head(own, weights)


def _told(settings: Any) -> list[str]:
    """The names of the numbers that a network is told."""
    times = getattr(settings, "times", None)  # a denoiser has none
    guidance = ("w", "t_min", "t_max") if times else ("ln w",)
    return [*(times or "t").split(","), *(guidance if settings.guidance_inputs else ())]


def _fit_parts(own: dict[str, Tensor], weights: dict[str, Tensor], place: dict[int, int]) -> None:
    """A DiT's embedding of each number, and its tokens."""
    theirs = {name: weights.pop(name) for name in [*weights] if re.match(r"model\.(map_layers|tokens)\.", name)}
    for name in own:
        if match := re.fullmatch(r"(model\.map_layers\.|model\.tokens\.told)(\d+)(.*)", name):
            i = int(match[2])
            source = f"{match[1]}{place[i]}{match[3]}" if i in place else None
            fresh = torch.zeros_like(own[name]) if match[3].startswith(".2.") else own[name]
            value = fresh if source is None else theirs.get(source)
        else:
            value = theirs.get(name)
        if value is not None:
            weights[name] = value


def _second_head(own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """The second head where there was one: a copy."""
    for name in [*weights]:
        twice = (2 * len(weights[name]), *weights[name].shape[1:]) if weights[name].ndim else None
        if OUTPUT_LAYER.fullmatch(name) and name in own and own[name].shape == twice:
            weights[name] = torch.cat([weights[name]] * 2)
    depth, own_blocks = (
        len({name.split(".")[2] for name in own if name.startswith(f"model.{blocks}.")})
        for blocks in ("blocks", "blocks_2")
    )
    for name in own:
        if name in weights or not name.startswith(("model.blocks_2.", "model.last_2.")):
            continue
        _, part, rest = name.split(".", 2)
        if part == "blocks_2":
            number, rest = rest.split(".", 1)
            rest = f"{depth - own_blocks + int(number)}.{rest}"
        source = f"model.{part.removesuffix('_2')}.{rest}"
        if source in weights:
            weights[name] = weights[source]


def how(model: torch.nn.Module, there: Any) -> str:
    """What a model is, at the start, of the model of the settings `there`; "" where it is that model."""
    tokens = "an initialisation only: the transformer is given new tokens"
    prefix = not getattr(model.model, "adaln", True)
    if model.clock == "sigma":
        return tokens if prefix and model.guidance_inputs and not there.guidance_inputs else ""
    names = ("times", "precond", "c_noise", "heads", "guidance_inputs")
    if all(getattr(model, name) == getattr(there, name) for name in names):
        return ""
    denoisers = ("edm", "trigflow")
    kin = there.precond == model.precond or (there.precond in denoisers and model.precond in denoisers)
    for key, same in (
        ("precond", kin),
        ("c_noise", there.c_noise == model.c_noise),
        ("sigma_data", there.sigma_data == model.sigma_data or model.precond == "flow"),
        ("times", (there.times or "t").split(",")[0] == model.times.split(",")[0]),
    ):
        if not same:
            old, new = getattr(there, key), getattr(model, key)
            return f"an initialisation only: network.{key} is {old} there and {new} here"
    if _told(there) != _told(model) and prefix:
        return tokens
    return "the same velocity where r = t"
