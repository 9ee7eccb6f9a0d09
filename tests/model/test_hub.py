"""Encoders on the hub: pushed to and fetched from a small server that speaks its API."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from small_hub import Hub, small_hub

from mmrec import cli
from mmrec.data.batches import collate_items
from mmrec.errors import UserError
from mmrec.manifest import Parent, read_manifest
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.model.hub import find_metrics, find_training, write_repository

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
METRICS = {
    "gallery": 240,
    "queries": 320,
    "slices": {
        name: {
            "queries": 9,
            "R@1": r1,
            "R@5": 0.5,
            "R@10": 0.6,
            "R@50": 0.9,
            "MRR": 0.4,
            "nDCG@10": 0.5,
        }
        for name, r1 in (("all", 0.4), ("cold", 0.25))
    },
    "intervals": {"all": {"R@1": [0.3, 0.5]}},
    "baselines": {},
    "shards": "00aa",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, and no way to any other host."""
    connect = socket.socket.connect

    def only_here(own: socket.socket, address: tuple) -> None:
        assert address[0] in ("127.0.0.1", "localhost"), f"asked {address}"
        connect(own, address)

    with small_hub() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, "")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "a-token")
        monkeypatch.setattr(socket.socket, "connect", only_here)
        yield hub


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(0)
    config = tmp_path_factory.mktemp("towers") / "narrow.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    return Encoder(EncoderConfig(towers=str(config), widths=(8,))).eval()


def embedded(encoder: Encoder, title: str = "A red mug") -> torch.Tensor:
    size = encoder.preprocess.size
    picture = torch.arange(3 * size * size).remainder(255).to(torch.uint8).view(3, size, size)
    items = collate_items([[picture]], [title], tokenizer=encoder.tokenizer, size=size)
    return encoder.embed_content(items)


def front_matter(card: bytes) -> dict:
    _, head, _ = card.decode().split("---\n", 2)
    return yaml.safe_load(head)


def test_what_was_pushed_comes_back(hub: Hub, encoder: Encoder) -> None:
    url = encoder.push_to_hub("team/mugs", private=True)
    assert url.startswith(f"{hub.url}/team/mugs/commit/")
    assert hub.created[0]["name"] == "mugs"
    assert hub.created[0].get("visibility", "private") == "private"
    again = Encoder.from_pretrained("team/mugs")
    assert torch.equal(embedded(encoder), embedded(again))
    assert again.fingerprint == read_manifest_of(hub)["fingerprint"]
    assert set(hub.files("team/mugs")) == {
        *(".gitattributes", "README.md", "config.json", "manifest.json", "model.safetensors"),
    }


def read_manifest_of(hub: Hub, revision: str = "main") -> dict:
    return json.loads(hub.files("team/mugs", revision)["manifest.json"])


def test_the_card_carries_figures_and_lineage(hub: Hub, tmp_path: Path, encoder: Encoder) -> None:
    parents = [Parent(kind="shards", fingerprint="00aa", path="/home/someone/data/shards")]
    fingerprint = encoder.save(tmp_path / "encoder", parents=parents)
    loaded = Encoder.from_pretrained(tmp_path / "encoder")
    loaded.push_to_hub(
        "team/mugs", metrics=METRICS | {"encoder": fingerprint}, license="apache-2.0"
    )
    files = hub.files("team/mugs")
    card = files["README.md"].decode()
    head = front_matter(files["README.md"])
    assert (head["library_name"], head["license"]) == ("mmrec", "apache-2.0")
    assert "mmrec" in head["tags"]
    (model,) = head["model-index"]
    assert model["name"] == "mugs"
    found = {
        (result["dataset"]["config"], metric["type"]): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }
    assert found["all", "r_at_1"] == 0.4
    assert found["cold", "r_at_1"] == 0.25
    assert found["all", "ndcg_at_10"] == 0.5
    assert "| this encoder, cold | 0.250 |" in card
    assert f"`{fingerprint}`" in card
    assert "| shards | `00aa` |" in card
    assert json.loads(files["metrics.json"])["encoder"] == fingerprint
    for name in ("README.md", "manifest.json", "config.json"):
        assert b"/home/someone" not in files[name]
    assert loaded.parents == parents


def test_without_figures_or_licence_the_card_claims_none(hub: Hub, encoder: Encoder) -> None:
    encoder.push_to_hub("team/mugs")
    head = front_matter(hub.files("team/mugs")["README.md"])
    assert "license" not in head
    assert "model-index" not in head


def test_figures_of_another_encoder_are_refused(hub: Hub, encoder: Encoder) -> None:
    with pytest.raises(UserError, match="metrics are of encoder beef, and this is"):
        encoder.push_to_hub("team/mugs", metrics=METRICS | {"encoder": "beef"})
    assert not hub.requests


def test_a_later_push_leaves_nothing_of_the_earlier(hub: Hub, encoder: Encoder) -> None:
    other = Encoder(encoder.config).eval()
    with_metrics = METRICS | {"encoder": encoder.fingerprint or saved(encoder)}
    encoder.push_to_hub("team/mugs", metrics=with_metrics)
    assert "metrics.json" in hub.files("team/mugs")
    first = hub.branches["team/mugs"]["main"]
    other.push_to_hub("team/mugs")
    assert "metrics.json" not in hub.files("team/mugs")
    assert torch.equal(embedded(Encoder.from_pretrained("team/mugs")), embedded(other))
    earlier = Encoder.from_pretrained("team/mugs", revision=first)
    assert torch.equal(embedded(earlier), embedded(encoder))
    earlier.push_to_hub("team/mugs", revision="next")
    assert "README.md" in hub.files("team/mugs", "next")
    at_next = Encoder.load("hf://team/mugs@next")
    assert at_next.fingerprint == earlier.fingerprint


def saved(encoder: Encoder) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return encoder.save(Path(folder) / "encoder")


def test_weights_that_were_exchanged_are_refused(hub: Hub, encoder: Encoder) -> None:
    encoder.push_to_hub("team/mugs")
    Encoder(encoder.config).push_to_hub("team/cups")
    mixed = hub.files("team/mugs") | {
        "model.safetensors": hub.files("team/cups")["model.safetensors"]
    }
    hub.commit("team/mugs", "main", mixed)
    with pytest.raises(UserError, match="not those that the manifest names"):
        Encoder.from_pretrained("team/mugs")


def test_refusals_name_the_mend(hub: Hub, encoder: Encoder, tmp_path: Path) -> None:
    hub.commit("team/words", "main", {"README.md": b"words"})
    cases = [
        (
            "team/none",
            None,
            "team/none at http://.*: no such repository, or a private one.*hf auth",
        ),
        ("team/words", "later", "team/words@later .*no such revision"),
        ("team/words", None, "team/words: holds no encoder of mmrec"),
        ("a/b/c", None, "neither a folder nor the name of a repository, which is user/name"),
        (str(tmp_path), "main", "is a folder, which has no revision"),
    ]
    for name, revision, message in cases:
        with pytest.raises(UserError, match=message):
            Encoder.from_pretrained(name, revision=revision)
    hub.refuse = 403
    with pytest.raises(UserError, match=r"team/mugs at .*not allowed: `hf auth login`"):
        encoder.push_to_hub("team/mugs")


def test_without_a_network_the_cache_serves(
    hub: Hub, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.push_to_hub("team/mugs")
    Encoder.from_pretrained("team/mugs")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert Encoder.from_pretrained("team/mugs").fingerprint
    with pytest.raises(UserError, match=r"the hub cannot be reached, and nothing of it is in"):
        Encoder.from_pretrained("team/cups")
    with pytest.raises(UserError, match=r"team/mugs at http://127.0.0.1:9: .*onnect"):
        encoder.push_to_hub("team/mugs")


# --- tokenizers --------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of transformers with a handful of words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    known = {word: n for n, word in enumerate(["<pad>", "<unk>", "a", "red", "mug", "blue"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def towers_with(words: Path, folder: Path, **tokenizer: object) -> Path:
    text = TEXT | {"vocab_size": 6, "hf_tokenizer_name": str(words)}
    text["tokenizer_kwargs"] = {"clean": "lower", **tokenizer}
    path = folder / "towers.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}))
    return path


def test_a_tokenizer_goes_with_its_encoder(hub: Hub, words: Path, tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(towers=str(towers_with(words, tmp_path)))).eval()
    expected = embedded(encoder)
    encoder.push_to_hub("team/mugs")
    assert json.loads(hub.files("team/mugs")["config.json"])["encoder"]["towers"] == "towers.json"
    for file in words.iterdir():  # What is left is what the repository holds.
        file.unlink()
    again = Encoder.from_pretrained("team/mugs")
    assert torch.equal(embedded(again), expected)
    assert not torch.equal(embedded(again, "a blue mug"), expected)
    again.save(tmp_path / "copy")
    assert torch.equal(embedded(Encoder.load(tmp_path / "copy")), expected)


def test_a_tokenizer_that_was_changed_is_refused(words: Path, tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(towers=str(towers_with(words, tmp_path)))).eval()
    write_repository(encoder, tmp_path / "encoder", repo_id="team/mugs")
    file = tmp_path / "encoder/tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("red", "rad"))
    with pytest.raises(UserError, match=r"tokenizer.json: missing, or not what the manifest names"):
        Encoder.load(tmp_path / "encoder")


def test_a_config_cannot_ask_for_code_to_be_run(words: Path, tmp_path: Path) -> None:
    towers = towers_with(words, tmp_path, trust_remote_code=True)
    Encoder(EncoderConfig(towers=str(towers))).save(tmp_path / "encoder")
    with pytest.raises(UserError, match="tokenizer_kwargs has trust_remote_code; expected some of"):
        Encoder.load(tmp_path / "encoder")


# --- the command -------------------------------------------------------------------------------


def test_the_command_finds_figures_and_run(
    hub: Hub,
    trained: Path,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained / "encoder"
    assert find_metrics(folder) is None
    command = f"mmrec evaluate --encoder {folder} --shards {tiny_shards} --no-untrained"
    out = trained.parent / "hub-evaluation"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(out)])
    cli.main()
    metrics = find_metrics(folder)
    assert metrics
    assert metrics["encoder"] == read_manifest(folder).fingerprint
    training = find_training(folder)
    assert training["config"]["epochs"] == 2
    assert "shards" not in training["config"]
    assert training["splits"]["train"]["contents"] > 0
    capsys.readouterr()
    cli.hub_push(encoder=folder, repo="team/mugs")
    assert "team/mugs/commit/" in capsys.readouterr().out
    card = hub.files("team/mugs")["README.md"].decode()
    assert "this encoder, all" in card
    assert '"epochs": 2' in card
    assert str(trained.parent) not in card
    with pytest.raises(UserError, match=r"expected the metrics.json of `mmrec evaluate`"):
        cli.hub_push(encoder=folder, repo="team/mugs", metrics=trained / "config.json")


def test_commands_take_an_encoder_of_the_hub(
    hub: Hub, encoder: Encoder, tiny_shards: Path, tmp_path: Path
) -> None:
    encoder.push_to_hub("team/mugs")
    named = Path("hf://team/mugs")
    cli.embed(encoder=named, shards=tiny_shards, out=tmp_path / "embeddings")
    cli.index_build(embeddings=tmp_path / "embeddings", out=tmp_path / "index")
    cli.search(index=tmp_path / "index", text="red mug", encoder=named)
    manifest = read_manifest(tmp_path / "embeddings")
    assert manifest.encoder == Encoder.from_pretrained("team/mugs").fingerprint


def test_the_endpoint_is_the_environments(hub: Hub, encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "encoder")
    command = f"-m mmrec.cli hub push --encoder {tmp_path}/encoder --repo team/mugs --license mit"
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pushed encoder {read_manifest_of(hub)['fingerprint']}: ")
    assert front_matter(hub.files("team/mugs")["README.md"])["license"] == "mit"
