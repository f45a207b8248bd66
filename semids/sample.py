"""A made-up catalogue to try semids on: the same bytes on every run, with the faults that real ones have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semids.errors import UsageError
from semids.store import commit

T = TypeVar("T")

# Of 3,000 items 2,820 texts remain, so that the 4,096 IDs of 16x16x16 are 1.45 times the distinct contents.
DUPLICATE_PERCENT = 6
NEAR_DUPLICATE_PERCENT = 12
TEST_PERCENT = 15
NO_BRAND_PERCENT = 7
NO_DESCRIPTION_PERCENT = 9
ATTEMPTS = 1000

BRANDS = (
    "Northvale", "Oakridge", "Brightwell", "Kestrel", "Halden", "Marlowe", "Tundra", "Vesper", "Quillon", "Pinecroft",
    "Solano", "Ironbark", "Lumen & Co", "Fairmont Works", "Blue Heron", "Castellan", "Ardent", "Mirelle", "Orrin",
    "Zephyra", "Copperfield", "Dunmore", "Elmstead", "Foxglove",
)  # fmt: skip
COLOURS = ("black", "white", "grey", "navy", "red", "forest green", "sand", "teal", "yellow", "copper")
USES = (
    "for everyday use", "for small homes", "for professionals", "for beginners", "for the whole family",
    "for travel", "for heavy use", "as a gift", "for left and right hands", "for tight spaces",
)  # fmt: skip
CARE = (
    "Wipe clean with a damp cloth.", "Ships in recycled packaging.", "Two-year warranty.", "Ready in ten minutes.",
    "Spare parts are available.", "Tested to European standards.", "No tools needed.", "Made in small batches.",
)  # fmt: skip
SPELLINGS = (
    ("colour", "color"), ("grey", "gray"), ("aluminium", "aluminum"), ("litre", "liter"), ("metre", "meter"),
    ("fibre", "fiber"), (" and ", " & "), (" with ", " w/ "),
)  # fmt: skip


@dataclass(frozen=True)
class _Category:
    """What products of a category are called, made of, and do; each entry of `sizes` fits every product."""

    products: Sequence[str]
    materials: Sequence[str]
    sizes: Sequence[str]
    features: Sequence[str]


CATEGORIES = {
    "Kitchen": _Category(
        ("frying pan", "saucepan", "chef's knife", "cutting board", "mixing bowl", "kettle", "coffee grinder",
         "baking tray", "casserole dish", "colander"),
        ("stainless steel", "cast iron", "bamboo", "enamelled steel", "ceramic", "anodised aluminium"),
        ("small", "medium", "large", "20 cm", "24 cm", "28 cm", "1 litre", "2 litre"),
        ("heats evenly on induction and gas hobs", "is safe in the dishwasher", "keeps a firm grip when wet",
         "resists scratches and stains", "pours without dripping", "stacks to save cupboard space"),
    ),
    "Tools": _Category(
        ("claw hammer", "cordless drill", "socket set", "tape measure", "hand saw", "spirit level", "wood chisel",
         "adjustable wrench", "screwdriver set", "bench clamp"),
        ("forged steel", "chrome vanadium", "fibreglass", "hardened steel", "die-cast aluminium", "beech"),
        ("compact", "full size", "150 mm", "200 mm", "300 mm", "12 piece", "24 piece", "5 metre"),
        ("absorbs shock on every blow", "drives screws into masonry and timber", "holds its edge through long jobs",
         "reads clearly in poor light", "locks with one hand", "hangs from a belt clip"),
    ),
    "Audio": _Category(
        ("over-ear headphones", "wireless earbuds", "bookshelf speaker", "soundbar", "turntable", "USB microphone",
         "portable radio", "headphone amplifier", "studio monitor", "Bluetooth speaker"),
        ("matte plastic", "walnut veneer", "brushed aluminium", "leatherette", "woven fabric", "rubberised shell"),
        ("mini", "standard", "20 W", "40 W", "100 W", "32 ohm", "80 ohm", "mono"),
        ("cancels noise on trains and planes", "plays for thirty hours on a charge", "gives deep, controlled bass",
         "pairs with two phones at once", "records voice and guitar cleanly", "folds flat into its case"),
    ),
    "Toys": _Category(
        ("building blocks", "wooden train set", "jigsaw puzzle", "plush bear", "toy kitchen", "marble run",
         "remote-control car", "board game", "dolls' house", "stacking rings"),
        ("beech wood", "recycled plastic", "organic cotton", "cardboard", "maple wood", "soft felt"),
        ("mini", "giant", "30 piece", "60 piece", "100 piece", "500 piece", "for ages 3+", "for ages 6+"),
        ("teaches shapes and counting", "has rounded edges for little hands", "sparks hours of pretend play",
         "fits other sets on the market", "builds patience and fine motor skills", "packs into a carry box"),
    ),
    "Office": _Category(
        ("desk lamp", "office chair", "notebook", "fountain pen", "stapler", "document tray", "whiteboard",
         "monitor stand", "paper shredder", "label maker"),
        ("powder-coated steel", "mesh", "recycled paper", "bamboo", "acrylic", "brushed metal"),
        ("compact", "wide", "A4", "A5", "set of 2", "set of 5", "tall", "foldable"),
        ("supports the back through long meetings", "keeps papers in order", "writes smoothly without smudging",
         "dims in five steps", "frees space for a keyboard", "runs quietly in open offices"),
    ),
    "Garden": _Category(
        ("watering can", "pruning shears", "garden hose", "plant pot", "rake", "bird feeder", "raised bed", "trowel",
         "compost bin", "solar lantern"),
        ("galvanised steel", "terracotta", "cedar", "weatherproof plastic", "carbon steel", "rattan"),
        ("5 litre", "10 litre", "50 litre", "15 metre", "30 metre", "small", "large", "pack of 3"),
        ("stands up to frost and rain", "cuts branches as thick as a thumb", "drains well to protect roots",
         "lights paths after dusk", "rolls up without kinks", "draws finches and robins"),
    ),
    "Outdoor": _Category(
        ("two-person tent", "sleeping bag", "camping stove", "hiking backpack", "head torch", "water bottle",
         "folding chair", "trekking poles", "dry bag", "cool box"),
        ("ripstop nylon", "titanium", "recycled polyester", "aluminium", "goose down", "canvas"),
        ("ultralight", "1 litre", "20 litre", "40 litre", "65 litre", "three-season", "winter", "short"),
        ("sheds rain in a downpour", "packs down to the size of a loaf", "boils water in four minutes",
         "spreads weight over the hips", "stays warm below freezing", "shines for eighty metres"),
    ),
    "Pets": _Category(
        ("dog bed", "cat tree", "leash", "chew toy", "litter box", "food bowl", "bird cage", "aquarium filter",
         "grooming brush", "pet carrier"),
        ("memory foam", "sisal", "nylon webbing", "natural rubber", "stainless steel", "plush fabric"),
        ("for puppies", "for kittens", "small", "medium", "large", "extra large", "60 litre", "120 cm"),
        ("has a cover that comes off for washing", "saves furniture from claws", "slows down greedy eaters",
         "keeps water clear for weeks", "removes loose fur without pulling", "calms nervous animals"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Item:
    title: str
    description: str | None
    brand: str | None
    category: str


class _Draws:
    """Draws from one seeded stream of PCG64, whose integers numpy keeps the same between versions."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def below(self, bound: int) -> int:
        """Return a uniform integer from 0 to bound - 1."""
        return int(self._generator.integers(bound))

    def choose(self, values: Sequence[str]) -> str:
        """Return a value, each as likely as the others."""
        return values[self.below(len(values))]

    def choose_skewed(self, values: Sequence[str]) -> str:
        """Return a value, the r-th one with a chance proportional to 1/r (Zipf)."""
        steps = np.cumsum(1_000_000 // np.arange(1, len(values) + 1))
        return values[int(np.searchsorted(steps, self.below(int(steps[-1])), side="right"))]

    def happens(self, percent: int) -> bool:
        """Return True in so many of 100 cases."""
        return self.below(100) < percent


def write_sample_catalogue(path: Path, items: int = 3000, seed: int = 0) -> None:
    """Write a made-up product catalogue as Parquet; equal arguments give equal bytes with equal libraries.

    Columns, all strings: item_id, title, description, brand, category, split (about 85 % train, the rest test).
    Categories, and brands within a category, follow a Zipf law; 6 % of the items repeat another one's text under an
    id of their own, about 12 % differ from another only in a colour, a size or a spelling, and some lack a brand
    or a description.

    Args:
        path: file to write; whole or not there at all.
        items: number of rows, from 1 up to about 500,000, where the vocabulary ends.
        seed: another one gives another catalogue.

    Raises:
        UsageError: `items` is not positive or beyond what the vocabulary can tell apart.
        StorageError: the file system refused.
    """
    if items < 1:
        raise UsageError(f"expected at least 1 item, got {items}")
    draws = _Draws(seed)
    catalogue = _draw_items(draws, items)
    table = pa.table(
        {
            "item_id": [f"P{number:07d}" for number in range(1, items + 1)],
            "title": pa.array([item.title for item in catalogue], pa.string()),
            "description": pa.array([item.description for item in catalogue], pa.string()),
            "brand": pa.array([item.brand for item in catalogue], pa.string()),
            "category": pa.array([item.category for item in catalogue], pa.string()),
            "split": ["test" if draws.happens(TEST_PERCENT) else "train" for _ in catalogue],
        }
    )
    commit(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _draw_items(draws: _Draws, items: int) -> list[_Item]:
    """Return the items in random order: all distinct but for the given share of exact repeats."""
    repeats = items * DUPLICATE_PERCENT // 100
    distinct: dict[_Item, None] = {}
    drawn: list[_Item] = []
    brands: dict[str, list[str]] = {category: _shuffle(draws, BRANDS) for category in CATEGORIES}
    while len(drawn) < items - repeats:
        for _ in range(ATTEMPTS):
            near = bool(drawn) and draws.happens(NEAR_DUPLICATE_PERCENT)
            item = _vary(draws, drawn[draws.below(len(drawn))]) if near else _draw_item(draws, brands)
            if item not in distinct:
                break
        else:
            raise UsageError(f"the sample's vocabulary ends at {len(drawn)} distinct items, got {items}; ask for fewer")
        distinct[item] = None
        drawn.append(item)
    drawn += [drawn[draws.below(items - repeats)] for _ in range(repeats)]
    return _shuffle(draws, drawn)


def _draw_item(draws: _Draws, brands: dict[str, list[str]]) -> _Item:
    name = draws.choose_skewed(list(CATEGORIES))
    category = CATEGORIES[name]
    product = draws.choose_skewed(category.products)
    material, size, colour = draws.choose(category.materials), draws.choose(category.sizes), draws.choose(COLOURS)
    brand = None if draws.happens(NO_BRAND_PERCENT) else draws.choose_skewed(brands[name])
    first, second = _shuffle(draws, category.features)[:2]
    title = f"{material} {product}, {colour}, {size}"
    description = (
        f"This {material} {product} {first} and {second}. A good choice {draws.choose(USES)}. {draws.choose(CARE)}"
    )
    return _Item(
        title=title[0].upper() + title[1:],
        description=None if draws.happens(NO_DESCRIPTION_PERCENT) else description,
        brand=brand,
        category=name,
    )


def _vary(draws: _Draws, item: _Item) -> _Item:
    """Return an item that differs in its colour, its size or a spelling; the same one if there is none to change."""
    start, colour, size = item.title.rsplit(", ", 2)
    change = draws.below(3)
    if change == 0:
        return replace(item, title=", ".join((start, draws.choose(COLOURS), size)))
    if change == 1:
        return replace(item, title=", ".join((start, colour, draws.choose(CATEGORIES[item.category].sizes))))
    old, new = SPELLINGS[draws.below(len(SPELLINGS))]
    description = item.description.replace(old, new) if item.description else None
    return replace(item, title=item.title.replace(old, new), description=description)


def _shuffle(draws: _Draws, values: Sequence[T]) -> list[T]:
    shuffled = list(values)
    for place in range(len(shuffled) - 1, 0, -1):
        other = draws.below(place + 1)
        shuffled[place], shuffled[other] = shuffled[other], shuffled[place]
    return shuffled
