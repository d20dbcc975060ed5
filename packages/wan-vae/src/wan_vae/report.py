"""What `wan-vae eval` tells: the measures and what they mean, a table, JSON, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .evaluation import Measured
from .measures import MEASURES, NOT_COMPUTED, PSNR, text
from .perceptual import WINDOW, frechet
from .sheet import contact_sheet, png
from .thumbnails import AMPLIFY

FORMAT = "wan-vae-eval/1"


@dataclass(frozen=True)
class Report:
    """All clips through all codecs, in the order in which they were measured."""

    measured: Sequence[Measured]
    settings: dict[str, Any]

    def names(self) -> dict[str, str]:
        """What tables and pictures call a clip: its file's name where no other clip has that, else its path."""
        clips = list(dict.fromkeys(one.clip for one in self.measured))
        short = [Path(clip).name for clip in clips]
        return {clip: name if name and short.count(name) == 1 else clip for clip, name in zip(clips, short, strict=True)}

    def codecs(self) -> list[str]:
        return list(dict.fromkeys(one.codec for one in self.measured))

    def means(self) -> list[dict[str, Any]]:
        """For every codec the mean of each measure over the clips that have it, and rFVD over all clips (None below 2 windows)."""
        rows = []
        for codec in self.codecs():
            chosen = [one for one in self.measured if one.codec == codec]
            row: dict[str, Any] = {"codec": codec, "clips": len(chosen), "frames": sum(one.values["frames"] for one in chosen)}
            for measure in MEASURES:
                found = [one.values[measure.key] for one in chosen if one.values.get(measure.key) is not None]
                row[measure.key] = _mean(found)
            sets = [[features for one in chosen for features in one.features[side]] for side in (0, 1)]
            row["rfvd"], row["rfvd_windows"] = frechet(*sets), len(sets[0])
            rows.append(row)
        return rows

    def to_json(self) -> str:
        """`{"format", "settings", "units", "results", "means"}`; what was not computed is "not computed", infinity is "inf"."""
        results = [{"clip": one.clip, "codec": one.codec, **one.values} for one in self.measured]
        units = {measure.key: "bytes" if measure.key == "peak_memory" else measure.unit for measure in MEASURES}
        plain = [[{key: _plain(value) for key, value in row.items()} for row in rows] for rows in (results, self.means())]
        record = {"format": FORMAT, "settings": self.settings, "units": units, "results": plain[0], "means": plain[1]}
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)

    def rows(self) -> list[dict[str, str]]:
        """The table: a row a clip and codec, and a row of means a codec, as text. Measures that nobody asked for are left out."""
        means, names = self.means(), self.names()
        shown = [measure for measure in MEASURES if measure.shown or any(row[measure.key] is not None for row in means)]
        shown = [measure for measure in shown if measure.shown or not measure.key.startswith(("psnr_", "ssim_"))]
        table = []
        for mean in means:
            for one in self.measured:
                if one.codec == mean["codec"]:
                    size = f"{one.values['width']}x{one.values['height']}"
                    table.append({"clip": names[one.clip], "codec": one.codec, "frames": str(one.values["frames"]), "size": size})
                    table[-1] |= {measure.label: text(measure, one.values.get(measure.key)) for measure in shown}
                    if "rFVD" in table[-1]:
                        table[-1]["rFVD"] = ""  # of all clips together
            table.append({"clip": f"mean of {mean['clips']}", "codec": mean["codec"], "frames": "", "size": ""})
            table[-1] |= {measure.label: text(measure, mean[measure.key]) for measure in shown}
        return table

    def missing(self) -> list[str]:
        """A line each about LPIPS and rFVD where they were not computed, and why."""
        mean = self.means()[0]
        lines = [] if self.settings.get("lpips_weights") else [f"LPIPS: {NOT_COMPUTED}, no network is given (--lpips-weights)"]
        if not self.settings.get("fvd_model"):
            lines.append(f"rFVD: {NOT_COMPUTED}, no network is given (--fvd-model)")
        elif mean["rfvd"] is None:
            lines.append(f"rFVD: {NOT_COMPUTED}, it needs 2 windows of {WINDOW} frames and the clips have {mean['rfvd_windows']}")
        return lines

    def sheet(self) -> bytes:
        """The contact sheet of all clips, a PNG."""
        return png(contact_sheet(self._by_clip()))

    def to_html(self) -> str:
        """The page, with the table, the measures' meanings and every clip's pictures."""
        rows = self.rows()
        head = "".join(f"<th>{escape(label)}</th>" for label in rows[0])
        body = "".join(_html_row(row) for row in rows)
        pictures = "".join(
            _figure(clip, png(contact_sheet({clip: found}, captions=False)), found) for clip, found in self._by_clip().items()
        )
        labels = {measure.label for measure in MEASURES} & set(rows[0])
        meanings = "".join(
            f"<dt>{escape(measure.label)}{f' <small>{measure.unit}</small>' if measure.unit else ''}</dt><dd>{escape(measure.meaning)}</dd>"
            for measure in MEASURES
            if measure.label in labels
        )
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items() if value is not None)
        note = "".join(f"<p>{escape(line)}</p>" for line in self.missing())
        return PAGE.format(
            style=STYLE, head=head, body=body, settings=escape(settings), note=note, pictures=pictures, meanings=meanings, amplify=AMPLIFY
        )

    def _by_clip(self) -> dict[str, list[Measured]]:
        return {name: [one for one in self.measured if one.clip == clip] for clip, name in self.names().items()}


def _mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return math.nan if {math.inf, -math.inf} <= set(values) else sum(values) / len(values)


def _plain(value: Any) -> Any:
    if value is None:
        return NOT_COMPUTED
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _html_row(row: dict[str, str]) -> str:
    cells = "".join(f"<td{' class=none' if value == NOT_COMPUTED else ''}>{escape(value)}</td>" for value in row.values())
    return f"<tr{'' if row['size'] else ' class=mean'}>{cells}</tr>\n"


def _figure(clip: str, image: bytes, found: Sequence[Measured]) -> str:
    data = base64.b64encode(image).decode()
    codecs = "; ".join(f"{one.codec} {text(PSNR, one.values['psnr'])} dB" for one in found)
    name = escape(clip, quote=True)
    caption = f"<figcaption>{name} <small>{escape(codecs)}</small></figcaption>"
    return f'<figure>{caption}<img alt="Pictures of {name}" src="data:image/png;base64,{data}"></figure>\n'


STYLE = """:root{color-scheme:light dark;--line:#8884;--soft:#8882;--dim:#777}
@media(prefers-color-scheme:dark){:root{--dim:#999}}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;padding:0 1.2rem;max-width:88rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.2rem}
.table{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:12.5px}
th,td{padding:.3rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600}th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
tr.mean{font-weight:600;background:var(--soft)}.none,small,.dim{color:var(--dim);font-weight:400}
.none{font-size:11px;line-height:1.1;white-space:normal}
figure{margin:1.5rem 0}figcaption{font-weight:600;margin-bottom:.4rem;overflow-wrap:anywhere}
img{max-width:100%;height:auto;border-radius:4px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;font-size:13px}dt{font-weight:600}dd{margin:0}"""

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>wan-vae eval</title>
<style>{style}</style></head>
<body>
<h1>wan-vae eval</h1>
<p class="dim">{settings}</p>
<div class="table"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table></div>
{note}
<h2>Pictures</h2>
<p class="dim">The original, then for every codec its reconstruction and {amplify} times their difference.</p>
{pictures}
<h2>Measures</h2>
<dl>{meanings}</dl>
</body>
</html>
"""
