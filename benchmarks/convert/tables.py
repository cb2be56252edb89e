"""The tables of converted models, in Markdown."""

from __future__ import annotations

from pws.bench.result_file import Result


def conversions_table(result: Result) -> str:
    """Markdown: a line per model."""
    lines = [
        "| model | parameters | standardized | norms removed | kept | loss, first and last | fold differs by | failures |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for spec, model in result["models"].items():
        losses, fold = model["losses"], model["fold_difference"]
        cells = [
            spec,
            f"{model['parameters'] / 1e6:.2f} M",
            str(model["standardized"]),
            str(model["removed"]),
            str(model["kept_norms"]),
            f"{losses[0]:.3g}, {losses[-1]:.3g}" if losses else "-",
            "-" if fold is None else f"{fold:.0e}",
            "; ".join(model["failures"]) or (f"not run: {model['not_run']}" if model["not_run"] else "none"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def conversions_summary(result: Result) -> str:
    """Markdown: a line per library, with the models that failed."""
    lines = ["| library | models | run | passed | failed | not run |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for library in dict.fromkeys(spec.partition(":")[0] for spec in result["models"]):
        models = {spec: m for spec, m in result["models"].items() if spec.startswith(f"{library}:")}
        idle = [spec for spec, model in models.items() if model["not_run"]]
        failed = [spec for spec, model in models.items() if model["failures"]]
        run = len(models) - len(idle)
        names = [", ".join(spec.partition(":")[2] for spec in specs) or "-" for specs in (failed, idle)]
        lines.append(f"| {library} | {len(models)} | {run} | {run - len(failed)} | {' | '.join(names)} |")
    return "\n".join(lines) + "\n"
