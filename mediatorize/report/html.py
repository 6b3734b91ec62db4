"""A document as one HTML file that needs nothing beside it: style and script inline, pictures within, no network; readable on a phone."""

from __future__ import annotations

import base64
from pathlib import Path

from mediatorize.report.document import Document

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ document.title }}</title>
<style>
:root { color-scheme: light; --ink: #1c2228; --soft: #5b6670; --line: #dfe4e8; --tint: #f6f8f9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 2.75rem 0 .75rem; }
p { margin: 0 0 1rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; line-height: 1.55; padding: 1rem 1.25rem; background: var(--tint); border-radius: .5rem; max-width: none; }
.lead p { max-width: none; margin: .4rem 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums lining-nums; min-width: 50%; }
th, td { padding: .42rem .9rem .42rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: #fff; padding-right: 1.2rem; }
table.words td, table.words th { text-align: left; }
table.words td + td { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; font-weight: 400; }
table.words th:first-child, table.words td:first-child { position: static; }
figure { margin: 0 0 1.5rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
.sides { width: fit-content; max-width: 100%; }
.over { position: relative; --at: 50%; }
.over > div + div { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.over::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px; background: #c8553d; }
.over span { display: none; }
.sides input[type=range] { display: block; width: 100%; margin: .5rem 0 .1rem; accent-color: #c8553d; }
.sides .controls, .sides figcaption { width: 0; min-width: 100%; font-size: .92rem; }
.sides .ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .85rem; }
.sides label { display: inline-block; margin-right: 1rem; padding: .25rem 0; }
pre { margin: 0 0 1.25rem; padding: .8rem 1rem; background: var(--tint); border-radius: .5rem;
  font: .84rem/1.5 ui-monospace, Menlo, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 0 0 .6rem; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; margin-bottom: .4rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .lead { font-size: 1.02rem; padding: .9rem 1rem; }
  .wide img { max-width: none; width: 44rem; }
}
@media print {
  details > * { display: block; }
  .over { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; width: 100%; }
  .over > div, .over > div[hidden] { display: block; }
  .over > div + div { position: static; clip-path: none; }
  .over span { display: block; }
  .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; }
  table { font-size: .72rem; }
  th { font-size: .68rem; white-space: normal; }
  th, td { padding-right: .6rem; }
  .over::after, .controls { display: none; }
}
</style>
</head>
<body>
<main>
<h1>{{ document.title }}</h1>
<div class="lead">{% for paragraph in document.lead.splitlines() if paragraph %}<p>{{ paragraph }}</p>{% endfor %}</div>
{% for block in document.blocks %}
{% set kind = block.__class__.__name__ %}
{% if kind == "Heading" %}
<h2>{{ block.text }}</h2>
{% elif kind == "Text" %}
<p>{{ block.text }}</p>
{% elif kind == "Table" %}
<div class="scroll"><table{% if block.words %} class="words"{% endif %}>
<thead><tr>{% for cell in block.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% elif kind == "Picture" %}
<figure>
<div class="scroll{% if block.wide %} wide{% endif %}"><img alt="{{ block.caption }}" src="{{ block.path | data_url }}"></div>
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif kind == "Sides" %}
<figure class="sides">
<div class="over">
<div><img alt="{{ block.first.caption }}" src="{{ block.first.path | data_url }}"><span>{{ block.first.caption }}</span></div>
{% for other in block.others %}
<div{% if not loop.first %} hidden{% endif %}>
<img alt="{{ other.caption }}" src="{{ other.path | data_url }}"><span>{{ other.caption }}</span></div>
{% endfor %}
</div>
<div class="controls">
<input type="range" min="0" max="100" value="50" aria-label="How much of each is seen"
 oninput="this.closest('figure').firstElementChild.style.setProperty('--at', this.value + '%')">
<div class="ends"><span>{{ block.first.caption }}</span><output>{{ block.others[0].caption }}</output></div>
{% for other in block.others %}
<label><input type="radio" name="{{ block.first.path.name }}" value="{{ loop.index }}"{% if loop.first %} checked{% endif %}
 onchange="const figure = this.closest('figure'); figure.querySelector('output').textContent = this.parentElement.textContent;
 [...figure.firstElementChild.children].forEach((one, at) => one.hidden = at && at != this.value)">
{{ other.caption }}</label>
{% endfor %}
</div>
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif block.summary %}
<details><summary>{{ block.summary }}</summary><pre>{{ block.text }}</pre></details>
{% else %}
<pre>{{ block.text }}</pre>
{% endif %}
{% endfor %}
</main>
</body>
</html>
"""
"""In Jinja's language (jinja.palletsprojects.com): whatever stands in double braces is escaped."""


def html_page(document: Document) -> str:
    """The whole page as text. Reads the pictures' files."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters["data_url"] = _data_url
    return environment.from_string(TEMPLATE).render(document=document)


def _data_url(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
