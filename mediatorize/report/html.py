"""A document as one HTML file that needs nothing beside it: style inline, pictures within, no network; readable on a phone."""

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
p.lead { font-size: 1.1rem; line-height: 1.55; padding: 1rem 1.25rem; background: var(--tint); border-radius: .5rem; max-width: none; }
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
pre { margin: 0 0 1.25rem; padding: .8rem 1rem; background: var(--tint); border-radius: .5rem;
  font: .84rem/1.5 ui-monospace, Menlo, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 0 0 .6rem; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; margin-bottom: .4rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  p.lead { font-size: 1.02rem; padding: .9rem 1rem; }
  .wide img { max-width: none; width: 44rem; }
}
@media print { details > * { display: block; } }
</style>
</head>
<body>
<main>
<h1>{{ document.title }}</h1>
<p class="lead">{{ document.lead }}</p>
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
