"""BD-rates of methods that compress the Kodak photographs, from their curves of bits and quality."""

from collections.abc import Sequence

from .common import number
from .kodak import bd_rate
from .report_columns import Column, Row, figures, format_number, markdown, words

REFERENCES = ("JPEG", "WEBP", "AVIF")
COLUMNS: tuple[Column, ...] = (
    *(words("method", "method"), words("quality", "quality"), figures("bits/pixel", "bits_per_pixel", digits=3)),
    *(figures("PSNR, dB", "psnr", digits=4), figures("MS-SSIM", "ms_ssim", digits=4), words("training", "stopped")),
    *(words("photographs", "photographs"), words("processor", "processor"), words("error", "error")),
)


def bd_table(rows: Sequence[Row]) -> str:
    """A table of BD-rates against each reference, in percent."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("error"):
            curves.setdefault(row["method"], []).append(row)
    found = []
    for method, points in curves.items():
        line: Row = {"method": method}
        for reference in REFERENCES:
            for name in ("psnr", "ms_ssim"):
                if reference != method and reference in curves:
                    rate = bd_rate(_curve(curves[reference], name), _curve(points, name))
                    line[f"{reference} {name}"] = (
                        "no common range" if rate is None else f"{format_number(100 * rate)} %"
                    )
        found.append(line)
    heads = {"psnr": "at equal PSNR", "ms_ssim": "at equal MS-SSIM"}
    columns = [
        words(f"{reference}, {heads[name]}", f"{reference} {name}") for reference in REFERENCES for name in heads
    ]
    return "BD-rate against\n\n" + markdown((words("method", "method"), *columns), found)


def _curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    points = [(number(row, "bits_per_pixel"), number(row, name)) for row in rows]
    return [(bits, quality) for bits, quality in points if bits is not None and quality is not None]
