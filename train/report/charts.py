"""How a run learns, in figures: losses, held-out clips, dictionaries, selection, speed."""

from __future__ import annotations

from collections.abc import Iterator

from cmacc.train.report.facts import Run
from cmacc.train.report.lines import Line, line_chart

_MODALITIES = (("video", "video", 1), ("audio", "audio", 2))


def charts(run: Run) -> Iterator[str]:
    """Sections of figures; one that has no number is left out."""
    yield from _section("How it learns", _learning(run))
    yield from _section("What is in the dictionaries", _diversity(run))
    yield from _section("How negatives are chosen", _selection(run))
    yield from _section("Speed", _speed(run))


def _section(title: str, charts: Iterator[str]) -> Iterator[str]:
    drawn = [chart for chart in charts if chart]
    if drawn:
        yield f'<h2>{title}</h2><section class="charts curves">{"".join(drawn)}</section>'
    elif title == "How it learns":
        yield f'<h2>{title}</h2><p class="none">There is no number in its log yet.</p>'


def _pair(run: Run, name: str, chance: str = "") -> list[Line]:
    """The lines of both modalities. name: with {} for the modality."""
    lines = [Line(label, run.points(name.format(m)), colour) for m, label, colour in _MODALITIES]
    return [*lines, Line("chance", run.points(chance), 0, chance=True)] if chance else lines


def _learning(run: Run) -> Iterator[str]:
    ways = (("video_to_audio", "picture → sound", 1), ("audio_to_video", "sound → picture", 2))
    lines = [Line(label, run.points(f"loss/{way}"), colour) for way, label, colour in ways]
    lines += [Line("chance", run.points(f"chance/{ways[0][0]}"), 0, chance=True)]
    yield line_chart("Loss terms, nats", lines, note="Chance is what encoders that see nothing score: ln(terms).")
    for title, names in (
        ("Held-out retrieval", (("R@1", "R@1"), ("R@5", "R@5"))),
        ("Its class is found first", (("class@1", "class@1"), ("same_class_R@1", "R@1 in its class"))),
    ):
        lines = []
        for colour, (name, label) in enumerate(names, start=3):
            lines.append(Line(label, run.points(f"held_out/{name}"), colour))
            lines.append(Line("chance", run.points(f"held_out/chance_{name}"), colour, chance=True))
        yield line_chart(title, lines, note="Among clips that were not learned from, mean of both directions.", share=True)
    for kind, title in (("knn_", "k-NN of embeddings"), ("knn_features_", "k-NN of features")):
        lines = [*_pair(run, f"held_out/{kind}{{}}"), Line("side by side", run.points(f"held_out/{kind}both"), 3)]
        lines.append(Line("chance", run.points("held_out/chance_knn"), 0, chance=True))
        what = "what the backbones give" if "features" in kind else "embeddings"
        if any(line.points for line in lines[:-1]):
            yield line_chart(title, lines, note=f"Held-out clips put into a class by the others, by {what}.", share=True)
    yield line_chart("Learning rate", [Line("rate", run.points("optimiser/rate"), 4)])
    norms = [*_pair(run, "optimiser/gradient_norm_{}"), Line("both", run.points("optimiser/gradient_norm"), 0)]
    yield line_chart("Gradient norms", norms)
    yield line_chart("Effective rank of queries", _pair(run, "queries/effective_rank_{}"), note="Near 1: all lie on a line.")
    yield line_chart("Uniformity of queries", _pair(run, "queries/uniformity_{}"), note="0: one point; −4: an even sphere.")


def _diversity(run: Run) -> Iterator[str]:
    yield line_chart("Distinct classes", _pair(run, "dictionary_{}/classes"), note="Labels are counted, not learned from.")
    yield line_chart("Share of duplicate clips", _pair(run, "dictionary_{}/duplicates"))
    yield line_chart("Age of keys, steps", _pair(run, "dictionary_{}/age"))
    yield line_chart("Mean cosine of pairs", _pair(run, "dictionary_{}/cosine"))


def _selection(run: Run) -> Iterator[str]:
    note = "|R| is a candidate's uncertainty: where it has no spread, only diversity chooses."
    yield line_chart("Mean of |R|", _pair(run, "selection/residual_mean_{}"), note=note)
    yield line_chart("Spread of |R|", _pair(run, "selection/residual_std_{}"))
    yield line_chart("Picks a step", [Line("both directions", run.points("selection/picked"), 4)])
    if run.config.objective.uses_candidates:
        yield line_chart("Cost, share of a step", [Line("selection", run.points("selection/share"), 4)])


def _speed(run: Run) -> Iterator[str]:
    yield line_chart("Clips a second", [Line("end to end", run.points("speed/clips_per_s"), 4)])
    yield line_chart("Waiting for data, share of the time", [Line("waiting", run.points("speed/waiting"), 5)])
