"""`moe_experts` as a layer calls it: the router first, in the same timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from twotower_ext._samples import Sample
from twotower_ext.registry import OPS

from .dimensions import Dimensions
from .inputs import Draw, Numbers

TOKENS = (512, 1024, 2048, 8192)


@dataclass(frozen=True)
class Routed(Sample):
    """Arguments of `moe_experts`, and those of the `moe_route` that its experts and their weights come from."""

    route: Sample = field(kw_only=True)


def routed_draws(d: Dimensions, plain: dict[str, Draw]) -> dict[str, Draw]:
    """Case -> how its samples are drawn: as those of `plain`, with the experts that a random router chooses."""

    def routed(draw: Draw) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            return [_route(n, d, sample) for sample in draw(n)]

        return samples

    return {f"T{tokens}-routed": routed(plain[f"T{tokens}"]) for tokens in TOKENS}


def _route(n: Numbers, d: Dimensions, sample: Sample) -> Routed:
    x, ids, weights, *experts = sample.args
    gate, bias = n.acc(d.experts, d.hidden, scale=d.hidden**-0.5), n.acc(d.experts, scale=0.01)
    route = Sample(sample.name, (x, gate, bias, d.top_k, 2.5))
    if n.device != "meta":
        ids, weights = OPS["moe_route"].op(*route.args)
    return Routed(sample.name, (x, ids, weights, *experts), sample.kwargs, route=route)


def after_router(function: Callable[[], Any], router: Callable[..., Any], sample: Sample) -> Callable[[], Any]:
    """The function, on a routed sample after the router. What that chooses is not handed on: of two experts with nearly
    the same score another router may take the other one."""
    if not isinstance(sample, Routed):
        return function
    arguments = sample.route.args

    def called() -> Any:
        router(*arguments)
        return function()

    return called
