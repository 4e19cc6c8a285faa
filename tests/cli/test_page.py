"""The page of a comparison: what is in it, what it escapes, and how a browser takes it."""

from __future__ import annotations

import ast
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fewbits.cli.measured import Comparison, Figures, Plan, Row, Subject
from fewbits.cli.page import check_page, render, snippet, write_page
from fewbits.cli.page.plots import Scale, kind_and_layer
from fewbits.evaluate import Quality

HOSTILE = "<script>alert(1)</script> $x$ \"&\" 'so' #000001"
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
PLAN = Plan(count=32, tokens=128, seed=0, threads=1, batch=8, prompt="Once upon a time")
VOID = {"meta", "br", "link", "img"}


def errors(size: float, layers: int = 4) -> dict[str, float]:
    found = {
        f"model.layers.{layer}.{kind}.weight": size * (1 + 0.1 * layer + 0.03 * index)
        for layer in range(layers)
        for index, kind in enumerate(KINDS)
    }
    return {"model.embed_tokens.weight": 0.0, **found}


def figures(megabytes: float, kl: float, error: float) -> Figures:
    quality = Quality(12.5 + kl, kl, kl / 20, kl / 2, 6 * kl, 20 * kl, 1 - 5 * kl, 4064)
    return Figures(
        weight_bytes=int(1e6 * megabytes),
        kept_bytes=1_050_000,
        bits_per_weight=8 * megabytes / 3.28,
        parameters=3_280_000,
        dtype="bfloat16",
        stored={"bfloat16": 10, "nf4:g64": 28},
        quality=quality,
        weight_errors=errors(error) if error else {},
        weight_note="",
        tokens_per_second=50.0,
        decoded_tokens=32,
        decode_repeats=3,
        peak_bytes=27_000_000,
        peak_is_exact=True,
        text="Once upon a time, there was a model.",
    )


def row(label: str, megabytes: float, kl: float, error: float) -> Row:
    subject = Subject(label, label, f"models/{label}", f"/nowhere/{label}")
    return Row(subject, figures(megabytes, kl, error), {"config.json": "ab" * 32})


def comparison(*others: Row) -> Comparison:
    reference = row("full", 6.56, 0.0, 0.0)
    usual = (row("nf4", 2.47, 0.0125, 0.092), row("int8", 3.84, 0.0004, 0.007))
    return Comparison((reference, *(others or usual)), PLAN, "fewbits compare full nf4 int8")


@dataclass
class Element:
    """One element of a parsed page. text: all of it, also of what lies within."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Element]:
        below = [found for child in self.children for found in child.all(tag)]
        return [child for child in self.children if child.tag == tag] + below

    def by_id(self, name: str) -> Element:
        found = [one for one in self.everything() if one.attributes.get("id") == name]
        assert len(found) == 1, f"{len(found)} elements have the id {name}"
        return found[0]

    def everything(self) -> list[Element]:
        return [self, *(found for child in self.children for found in child.everything())]


class Reader(HTMLParser):
    """Builds the tree and insists on balanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs), f"an attribute of {tag} is there twice"
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def parse(html: str) -> Element:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


@pytest.fixture(scope="module")
def html() -> str:
    return render(comparison())


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return parse(html)


# --- what is in it ----------------------------------------------------------------------------------


def test_the_verdict_is_at_the_top(page: Element) -> None:
    verdict = page.by_id("verdict").text.replace("\N{NO-BREAK SPACE}", " ")
    assert verdict == comparison().verdict
    assert verdict.startswith("int8 is closest: it keeps 99.8 % of the top tokens at 0.59 × the size")


def test_tables_have_a_row_per_model(page: Element) -> None:
    for name in ("quality", "cost"):
        (body,) = page.by_id(name).all("tbody")
        assert [line.all("th")[0].text for line in body.all("tr")] == ["full", "nf4", "int8"]
        columns = {len(line.all("th")) + len(line.all("td")) for line in page.by_id(name).all("tr")}
        assert len(columns) == 1
    cells = [cell.text for cell in page.by_id("quality").all("tbody")[0].all("tr")[1].all("td")]
    assert cells == ["12.512", "12.50 ± 0.62", "6.25", "75.00", "250.00", "93.8 %", "12.51 %"]


def test_both_plots_are_there_and_named(page: Element) -> None:
    labels = {"size-quality": {"full", "nf4", "int8"}, "layer-errors": {"nf4", "int8"}}
    for name, expected in labels.items():
        plots = page.by_id(name).all("svg")
        assert [plot.attributes["class"] for plot in plots] == ["wide", "narrow"]
        for plot in plots:
            assert plot.children[0].tag == "title"
            texts = [text.text for text in plot.all("text")]
            assert expected <= set(texts)
            assert len(plot.all("path")) > 10
    assert {"weights, MB", "bits per weight"} <= {t.text for t in page.by_id("size-quality").all("text")}
    assert {"layer", "q_proj", "down_proj", "12.5"} <= {
        t.text for t in page.by_id("layer-errors").all("text")
    }


def test_the_worst_weights_are_named(page: Element) -> None:
    lines = page.by_id("worst").all("tbody")[0].all("tr")
    assert [cell.text for cell in lines[0].all("td")] == ["model.layers.3.mlp.down_proj", "12.51 %"]
    assert [line.all("th")[0].text for line in lines] == ["nf4", "", "", "int8", "", ""]


def test_hardware_provenance_and_snippets(page: Element) -> None:
    for wanted in ("1 thread on", "GB of memory", "fewbits compare full nf4 int8", "with seed 0", "ab" * 32):
        assert wanted in page.text
    code = [block.text for block in page.all("pre")]
    assert any('from_pretrained("models/nf4")' in block for block in code)
    assert any("get_peft_model" in block for block in code)
    for block in code[:-1]:
        ast.parse(block)


def test_nothing_is_fetched(html: str, page: Element) -> None:
    (policy,) = [meta for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not re.search(r"https?:|@import|//\w", html)
    assert not {one.tag for one in page.everything()} & {"script", "link", "img", "iframe", "image", "object"}
    for element in page.everything():
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value
                assert value.startswith("#")
    for reference in re.findall(r"url\(([^)]*)\)", html):
        assert reference.startswith("#")


def test_ids_are_unique(page: Element) -> None:
    names = Counter(one.attributes["id"] for one in page.everything() if "id" in one.attributes)
    assert set(names.values()) == {1}


def test_the_page_is_reproducible(html: str) -> None:
    assert render(comparison()) == html


# --- what others wrote ------------------------------------------------------------------------------


def test_names_are_escaped_everywhere() -> None:
    hostile = row(HOSTILE, 2.5, 0.012, 0.09)
    weights = {f"model.layers.0.{HOSTILE}.weight": 0.2, **errors(0.09)}
    hostile = replace(
        hostile, figures=replace(hostile.figures, weight_errors=weights, text=HOSTILE, stored={HOSTILE: 1})
    )
    found = comparison(hostile, row("nf4", 2.47, 0.0125, 0.092))
    html = render(replace(found, command=HOSTILE))
    page = parse(html)
    assert "<script" not in html
    assert not page.all("script")
    assert page.by_id("quality").all("tbody")[0].all("th")[1].text == HOSTILE
    assert any(text.text == HOSTILE for text in page.by_id("size-quality").all("text"))
    for block in [block.text for block in page.all("pre")][:-1]:
        ast.parse(block)


def test_a_snippet_holds_names_as_literals() -> None:
    nasty = row('x")\nimport os  # "', 2.5, 0.01, 0.09)
    tree = ast.parse(snippet(nasty, nasty).transformers)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported == ["fewbits"]


def test_a_snippet_holds_the_settings_and_a_tokenizer_that_exists(demo_model: Path) -> None:
    reference = Row(Subject("full", "full", "demo/model", str(demo_model)), figures(6.56, 0, 0), {})
    own = replace(reference.subject, settings={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    code = snippet(replace(reference, subject=own), reference).transformers
    assert "config = BitsAndBytesConfig(\n    load_in_4bit=True,\n    bnb_4bit_quant_type='nf4',\n)" in code
    assert 'AutoModelForCausalLM.from_pretrained("demo/model", quantization_config=config)' in code
    bare = snippet(row("nf4", 2.5, 0.01, 0.09), reference).transformers
    assert 'AutoTokenizer.from_pretrained("demo/model")' in bare


# --- odd figures ------------------------------------------------------------------------------------


def test_models_at_one_place_share_a_point_and_a_panel() -> None:
    page = parse(render(comparison(row("a", 2.5, 0.01, 0.09), row("b", 2.5, 0.01, 0.09))))
    assert "a = b" in [text.text for text in page.by_id("size-quality").all("text")]
    assert "a = b" in [text.text for text in page.by_id("layer-errors").all("text")]
    assert [line.all("th")[0].text for line in page.by_id("worst").all("tr")[1:]] == ["a = b", "", ""]


def test_equal_broken_and_unlike_models() -> None:
    """Nothing to draw is said, not drawn; nan and infinity break nothing."""
    equal = row("equal", 6.56, 0.0, 0.0)
    page = parse(render(comparison(equal)))
    assert page.by_id("size-quality").all("svg")
    assert not page.by_id("layer-errors").all("svg")
    assert "No weight differs" in page.by_id("layer-errors").text
    broken = row("broken", 2.5, math.nan, 0.09)
    unlike = replace(row("unlike", 1.0, math.inf, 0.0))
    unlike = replace(unlike, figures=replace(unlike.figures, weight_errors=None, weight_note="other shapes"))
    page = parse(render(comparison(broken, unlike)))
    assert not page.by_id("size-quality").all("svg")
    assert "No model has a finite KL divergence" in page.by_id("size-quality").text
    assert "unlike: no weight errors; other shapes" in page.text


def test_a_large_model_makes_no_large_page() -> None:
    weights = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight": 0.05 + 0.0001 * (layer + expert)
        for layer in range(94)
        for expert in range(64)
        for kind in ("gate_proj", "up_proj", "down_proj")
    }
    large = row("large", 2.5, 0.01, 0.09)
    large = replace(large, figures=replace(large.figures, weight_errors=weights))
    html = render(comparison(large))
    assert len(html) < 300_000
    texts = [text.text for text in parse(html).by_id("layer-errors").all("text")]
    assert texts.count("gate_proj") == 2


def test_parts_of_a_name() -> None:
    assert kind_and_layer("model.layers.3.self_attn.q_proj.weight") == ("self_attn.q_proj", 3)
    assert kind_and_layer("transformer.h.11.mlp.c_fc.bias") == ("mlp.c_fc.bias", 11)
    assert kind_and_layer("model.layers.3.mlp.experts.17.w1.weight") == ("mlp.experts.*.w1", 3)
    assert kind_and_layer("lm_head.weight") == ("lm_head", -1)


def test_the_scale_is_logarithmic_between_bounds() -> None:
    scale = Scale(0.001, 0.1)
    assert scale.share(0.01) == pytest.approx(0.5)
    assert (scale.share(0.0001), scale.share(0.2)) == (0.0, 1.0)
    assert scale.ticks()[0] == 0.001
    assert scale.ticks()[-1] == 0.1
    assert 0.01 in scale.ticks()


# --- writing ----------------------------------------------------------------------------------------


def test_a_page_replaces_what_was_there_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    check_page(path)
    write_page(comparison(), path, quiet=False)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o044 == 0o044  # as any file that is made
    told = capsys.readouterr()
    assert told.out == ""
    assert " ".join(told.err.split()).startswith("wrote ")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fewbits.cli.page.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_page(comparison(), path, quiet=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_page_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; try "):
        check_page(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_page(tmp_path / "nowhere" / "page.html")


def test_only_a_page_loads_matplotlib() -> None:
    script = "import sys, fewbits.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- in a browser -----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MEASURE = """<script>
document.body.dataset.sizes = JSON.stringify(["size-quality", "layer-errors"].map(id => {
  const shown = [...document.querySelectorAll(`#${id} svg`)].map(svg => svg.getBoundingClientRect());
  return shown.filter(box => box.width > 0 && box.height > 0).map(box => [box.width, box.height]);
}));
document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium here")
    return found


def browse(browser: str, folder: Path, html: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open `html` in a headless browser; whatever the page complains of fails the test."""
    path = folder / "shown.html"
    path.write_text(html, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
    logging = ("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}")
    command = [browser, *flags, *logging, *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return done


@pytest.mark.parametrize("width", [1200, 700, 500])
def test_both_plots_have_a_size(browser: str, html: str, tmp_path: Path, width: int) -> None:
    """One drawing of each shows at any width, and nothing sticks out of the page."""
    # The page itself runs no script, so a copy does that lets one in.
    scripted = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", MEASURE)
    done = browse(browser, tmp_path, scripted, "--dump-dom", f"--window-size={width},900")
    body = next(one for one in parse_loosely(done.stdout) if one.tag == "body")
    sizes = ast.literal_eval(body.attributes["data-sizes"] or "")
    assert [len(shown) for shown in sizes] == [1, 1]
    for ((wide, high),) in sizes:
        assert 200 < wide <= width
        assert 100 < high < 2000
    assert int(body.attributes["data-overflow"] or "") <= 0


def parse_loosely(html: str) -> list[Element]:
    return parse(html[html.index("<html") :]).everything()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn(browser: str, html: str, tmp_path: Path, scheme: str) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(browser, tmp_path, html, f"--screenshot={picture}", "--window-size=1200,1900", *dark)
    with Image.open(picture) as image:
        assert image.size == (1200, 1900)
        levels = image.convert("L").histogram()
        paper = max(range(256), key=levels.__getitem__)
        assert paper < 60 if scheme == "dark" else paper > 240
        assert sum(level > 0 for level in levels) > 100  # ink of many shades
        assert sum(levels) - levels[paper] > 60_000
