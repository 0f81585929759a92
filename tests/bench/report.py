"""What came of a run: a document to keep, and the table and the picture made from it."""

from __future__ import annotations

from typing import Any

from tests.bench.figures import Figure, Measured, quartiles

Document = dict[str, Any]


def entry(figure: Figure, seconds: float, measured: Measured | None, error: str) -> Document:
    """One figure of the document; ``error`` says why there is none."""
    found: Document = {
        "name": figure.name,
        "tier": figure.tier,
        "what": figure.what,
        "baseline": figure.baseline,
        "target": str(figure.target),
        "unit": figure.unit,
        "seconds": round(seconds, 1),
        "error": error,
    }
    if measured is None:
        return found
    value = quartiles(measured.values)
    found |= {
        "samples": len(measured.ours),
        "value": _spread(value),
        "ours": _spread(quartiles(each * figure.scale for each in measured.ours)),
        "met": figure.target.met(value[1]),
        "notes": measured.notes,
        "raw": {"ours": measured.ours, "baseline": measured.baseline},
    }
    if measured.baseline:
        found["theirs"] = _spread(quartiles(each * figure.scale for each in measured.baseline))
    return found


def _spread(of: tuple[float, float, float]) -> Document:
    return {"median": of[1], "q1": of[0], "q3": of[2]}


def line(found: Document) -> str:
    """One figure as it is told while the run goes on."""
    if "value" not in found:
        return f"{found['name']:18} FAILED after {found['seconds']} s: {found['error']}"
    told = f"{found['name']:18} {_number(found['value']['median'])} {_iqr(found)} of {found['samples']}"
    verdict = "met" if found["met"] else "MISSED"
    return f"{told}, target {found['target']}: {verdict} ({_amounts(found)}; {found['seconds']} s)"


def table(document: Document) -> str:
    """Markdown, as README has it."""
    rows = [
        "| figure | baseline | target | measured | spread (IQR) | n | amounts |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in document["figures"]:
        start = f"| {found['what']} | {found['baseline'] or '-'} | {found['target']} |"
        if "value" not in found:
            rows.append(f"{start} failed: {found['error']} | | | |")
            continue
        value = _number(found["value"]["median"])
        shown = f"**{value}**" if found["met"] else f"{value} (missed)"
        rows.append(f"{start} {shown} | {_iqr(found)} | {found['samples']} | {_amounts(found)} |")
    facts = document["machine"]
    end = f"Measured {document['date']} with `{document['command']}`: " + "; ".join(
        f"{name} {value}" for name, value in facts.items()
    )
    notes = [f"- {found['name']}: {note}" for found in document["figures"] for note in found.get("notes", ())]
    return "\n".join([*rows, "", end + ".", *(["", *notes] if notes else [])]) + "\n"


def _amounts(found: Document) -> str:
    if "theirs" not in found:
        return f"{_number(found['ours']['median'])} {found['unit']}"
    ours, theirs = (_number(found[whose]["median"]) for whose in ("ours", "theirs"))
    return f"{ours} / {theirs} {found['unit']}"


def _iqr(found: Document) -> str:
    value = found["value"]
    return f"{_number(value['q1'])} to {_number(value['q3'])}"


def _number(value: float) -> str:
    """Three digits that mean something."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 20 else 2 if abs(value) >= 0.1 or not value else 4
    return f"{value:.{digits}f}"
