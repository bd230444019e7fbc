"""Tables and figures of a study from what its steps left on disk; what is missing is named.

Nothing is computed twice: a number here is a number of a file of the study, except the
confidence intervals and paired tests of segmentation metrics, which `intervals` makes of the
images' counts in ``metrics.json``.
"""

from __future__ import annotations

from pathlib import Path

from ...staging import write_bytes_atomically
from . import donors, segmentation
from .page import Section, render
from .writer import Writer

__all__ = ["Section", "report"]

# Name, title, question, and what answers it.
_SECTIONS = (
    ("e0", "Data", "What was annotated, and how tiles and donors cover.", segmentation.data),
    ("e1", "E1 Segmentation", "Does fine-tuning segment better than the baseline?",
     segmentation.models),
    ("e1-thresholds", "E1.5 Thresholds",
     "Which flow and cell probability thresholds suit each model? Chosen on val, applied to test "
     "once.", segmentation.thresholds),
    ("e2", "E2 Label efficiency", "How many annotated images are enough?", segmentation.budget),
    ("e3", "E3 Gating",
     "Does dropping objects by intensity and area help? Chosen on val, applied to test once.",
     segmentation.gating),
    ("e4", "E4 Prompt density",
     "How sensitive are masks to the density of prompts? A proxy: fewer points stand for a higher "
     "flow threshold.", segmentation.prompts),
    ("e5", "E5 Donors",
     "Do donor ratios and densities follow clinical outcomes, and how stably?", donors.donors),
    ("e6", "E6 Leave one marker out",
     "How well does a model segment a marker that it was not trained on?", segmentation.lomo),
)  # fmt: skip


def report(study: str | Path, output: str | Path | None = None) -> list[Section]:
    """Writes ``index.html``, ``tables/*.tsv`` and ``figures/*.png`` and ``.pdf``.

    Args:
        study: the folder that all steps share: predictions, reports, logs, checkpoints,
            downstream.
        output: ``<study>/report`` by default.

    Returns:
        The sections, with what each is missing.

    Raises:
        OSError: no such folder; a file cannot be read or written.
        ImportError: matplotlib is not there.
    """
    from ...plots import study as plots

    study = Path(study)
    if not study.is_dir():
        raise NotADirectoryError(f"study: {study} is not a folder")
    output = Path(output) if output is not None else study / "report"
    writer = Writer(study, output, plots)
    sections = [writer.run(*section) for section in _SECTIONS]
    page = render(
        f"Segmentation study: {study.resolve().name}",
        "Whiskers and low/high are 95 % confidence intervals by bootstrap over donors (BCa), "
        "unless a caption says otherwise.",
        sections,
        output / "figures",
    )
    write_bytes_atomically(output / "index.html", page.encode())
    return sections
