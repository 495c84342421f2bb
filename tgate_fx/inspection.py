"""The public functions that look at a pipeline, and change nothing: sites, report, graphs."""

from __future__ import annotations

from typing import Any

from torch import nn

from .compiled.lora_scales import own_scales
from .gated import Gated, gated_of
from .ladder import measure_ladder
from .network import denoisers_of
from .phase_graph import PhaseGraph, graphs_of
from .report import Report
from .roles import Kind
from .sites import SiteInfo, SiteList, find_sites


def sites(target: Any) -> tuple[SiteInfo, ...]:
    """Return the sites that a pipeline or a denoiser has, or would have; `print` them for a list. Compiles nothing.

    These are the cross-attentions and, of a pipeline gated with self-attention intervals or DeepCache, what these
    cache. `report` counts those of the last generation, which may have been given intervals of its own.

    Raises:
        UnsupportedError: there is no denoiser, or it has no cross-attention.
    """
    gated = Gated.of(target)
    if gated is not None:
        cached = (each.network.cached_sites(gated.schedule) for each in gated.networks)
        return SiteList(site.info for sites in cached for site in sites)
    denoisers = [target] if isinstance(target, nn.Module) else denoisers_of(target).values()
    found = (site for denoiser in denoisers for site in find_sites(denoiser))
    return SiteList(SiteInfo(name, kind.title) for name, kind, _ in found if kind is Kind.CROSS_ATTENTION)


def report(pipe: Any, *, ladder: bool = False) -> Report:
    """Return what the last generation of a gated pipeline did, step by step; `print` it for a table.

    Args:
        pipe: a pipeline under `gate`, `compile` or `load`.
        ladder: also measure where its speed-up comes from, on this pipeline's own denoiser: what all steps take eagerly
            and ungated, then with guidance dropped as it was, then with each kind of site cached as it was, and last
            what the generation took compiled. Each different step runs a few times eagerly for this, on zeros.

    Raises:
        StateError: the pipeline is not gated; or, for a ladder, the last generation ran no step or compiled a graph, or
            the denoiser was moved to another device since.
    """
    gated = gated_of(pipe)
    steps = gated.steps.clock.steps() if gated.steps is not None else ()
    schedule = gated.steps.schedule if gated.steps is not None else gated.schedule
    return Report(
        steps=steps,
        compiled_graphs=sum(each.phases.graphs for each in gated.all),
        recompiles=sum(each.phases.recompiles for each in gated.all),
        gate=next((step.index for step in steps if step.phase.startswith(("post-gate", "forecast"))), None),
        sites=sum(len(each.network.cached_sites(schedule)) for each in gated.networks),
        compiler=gated.networks[0].phases.describe(),
        cache_bytes=sum(each.cache.nbytes for each in gated.all),
        ladder=measure_ladder(gated) if ladder else (),
        similarity=gated.steps.similarity if gated.steps is not None else None,
    )


def graphs(pipe: Any) -> dict[str, PhaseGraph]:
    """Return the phases of the last generation as graphs that can be read, run, checked and compared.

    Args:
        pipe: a pipeline under `gate` or `compile` that has generated something.

    Returns:
        For each phase, under the name that the report gives it ("pre-gate", "post-gate"), its graph: the denoiser's
        operations in that phase as a `torch.fx.GraphModule` over the denoiser's own parameters, for inputs of the
        shapes and dtypes of that generation. This is the graph as torch.export sees it, before any compiler.

    Raises:
        StateError: the pipeline is not gated, or nothing was generated yet.
        CompileError: torch.export cannot trace the denoiser.
    """
    gated = gated_of(pipe)
    with gated.one_at_a_time(), own_scales(gated):
        return graphs_of(gated)
