"""The page of ``pycert certify --report``: one self-contained HTML file with everything a result rests on."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
code { word-break: break-all; font-size: .85em }
img { max-width: 100% }
h2 { margin-top: 2rem }
"""

#: What each soundness promises; see the documentation's page on soundness for the derivations.
PROMISES = {
    "deployed": "The bounds enclose the network in real arithmetic with these weights and also every "
    "execution of it in its own dtype that forms each product once and sums in any order, rounding to "
    "nearest, with or without fused multiply-add. Not covered: transform-based convolutions (Winograd, FFT), "
    "Strassen products, TF32, half precision and emulated float32.",
    "real": "The bounds enclose the network in real arithmetic with these weights. An execution in floating "
    "point differs from it by its own rounding errors, which are not covered.",
    "none": "Plain arithmetic: rounding errors of the bounds themselves are not accounted for, so these are "
    "figures for comparison with other tools and prove nothing in the strict sense.",
}


def page(summary: dict[str, Any], picture: Path | None) -> str:
    """The HTML of the report; ``picture`` (a png or svg file) is embedded."""
    run, options = summary["run"], summary["run"]["options"]
    body = [
        "<h1>Certified accuracy</h1>",
        f"<p>{_text(summary['network'])} on {_text(summary['data'])}, {summary['samples']} samples, clean "
        f"accuracy {summary['clean']:.2%}.</p>",
        _results(summary),
        _image(picture) if picture is not None else "",
        "<h2>What is proved</h2>",
        f"<p>{_text(_claim(options))}</p><p>{_text(PROMISES[options['soundness']])}</p>",
        "<h2>What is not</h2>",
        _list(_limits(options)),
        "<h2>What it rests on</h2>",
        _table(_facts(summary, run, options)),
    ]
    title = f"pycert: {_text(summary['network'])} on {_text(summary['data'])}"
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _results(summary: dict[str, Any]) -> str:
    head = "<tr><th>eps</th><th>method</th><th>accuracy</th><th>samples</th><th>seconds</th></tr>"
    names = {"pgd": "PGD attack (upper limit)"}
    rows = [
        f"<tr><td class=number>{row['eps']:.6g}</td>"
        f"<td>{_text(names.get(row['method'], 'certified by ' + row['method']))}</td>"
        f"<td class=number>{row['accuracy']:.2%}</td><td class=number>{row['samples']}</td>"
        f"<td class=number>{row['seconds']:.2f}</td></tr>"
        for row in summary["rows"]
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _claim(options: dict[str, Any]) -> str:
    limits = options["clip"]
    clip = f" and with every coordinate in [{limits[0]:g}, {limits[1]:g}]" if limits else ""
    return (
        "For every sample counted as certified: the network classifies the sample correctly, and for every "
        f"input within distance eps of it in the L{options['p']} norm{clip}, the score of the true class is "
        "strictly the greatest."
    )


def _limits(options: dict[str, Any]) -> list[str]:
    limits = [
        "Nothing is said about inputs outside these balls, nor about samples that were not in the data: "
        "certified accuracy on a test set estimates, and does not prove, how often new samples can be "
        "certified.",
        "A sample that is not certified is not thereby misclassified: the bounds may be too loose. The PGD "
        "accuracy, where given, is an upper limit: the true robust accuracy lies between the two.",
        "Changes of another kind than the norm measures (rotation, light, meaning) are not covered.",
        "The certificate holds for the weights whose hash is given, with any normalisation stated below, not "
        "for a converted, quantised or fine-tuned copy, and not for what prepares the inputs.",
    ]
    if options["soundness"] == "deployed":
        limits.append(
            "On a CPU, torch may run some convolutions by NNPACK (Winograd, FFT), which is not covered. Here "
            "it was off; where the network is deployed, torch.backends.nnpack.set_flags(False) turns it off."
        )
    else:
        limits.append("Rounding errors of the network's own execution are not covered (see above).")
    return limits


def _facts(summary: dict[str, Any], run: dict[str, Any], options: dict[str, Any]) -> list[tuple[str, str]]:
    library, machine = run["library"], summary["made"]["machine"]
    normal = (
        f"inside the network, mean {options['mean']}, std {options['std']}"
        if options["mean"]
        else "none added"
    )
    attack = "none"
    if options["attack"]:
        attack = f"PGD, {options['attack'][0]} steps, {options['attack'][1]} restarts"
    return [
        ("network", run["network"]),
        ("weights, SHA-256", run["weights"]),
        ("structure, SHA-256", run["structure"]),
        ("data", f"{run['data']}, {run['samples']} samples"),
        ("inputs and classes, SHA-256", run["inputs"]),
        ("scaling", f"x divided by {options['scale']:g}" if options["scale"] else "none"),
        ("normalisation", normal),
        ("region", f"L{options['p']} ball of radius eps, clip {options['clip'] or 'none'}"),
        ("methods", ", ".join(options["methods"])),
        ("soundness", options["soundness"]),
        ("intersection with interval bounds", "yes" if options["intersect"] else "no"),
        ("cheap methods first", "yes" if options["cascade"] else "no"),
        ("attack", attack),
        ("arithmetic", f"{options['dtype']}, {options['device']}, batches of {options['batch_size']}"),
        ("settings of torch not covered", ", ".join(summary["made"]["uncovered"]) or "none"),
        ("seed", str(options["seed"])),
        ("library", f"pycert {library['pycert']}, torch {library['torch']}, Python {library['python']}"),
        ("library build, SHA-256", library["build"]),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"),
        ("threads", str(options["threads"])),
        ("started", summary["made"]["started"]),
        ("time", f"{sum(row['seconds'] for row in summary['rows']):.1f} s"),
    ]


def _image(picture: Path) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}.get(picture.suffix)
    if kind is None:
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<img alt="certified accuracy against eps" src="data:{kind};base64,{data}">'


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in rows]
    return f"<table>{''.join(lines)}</table>"


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _text(value: Any) -> str:
    return html.escape(str(value))
