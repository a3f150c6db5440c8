"""Write multiple-choice questions on words of radiology, without images, for a language model.

    python -m benchmarks.text_questions FOLDER

Each row asks what a word names; the options are the same in all rows. `written.jsonl` has rows with
a written `completion`, for supervised fine-tuning, `train.jsonl` rows for RL, `test.jsonl` rows; no
word occurs in two files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import report
from rlmed.core.types import LETTERS

_WORDS = {
    "a bone": (
        "femur, tibia, fibula, radius, ulna, humerus, scapula, clavicle, sternum, patella, sacrum, mandible, rib, talus, "
        "calcaneus, pelvis, coccyx, maxilla, vertebra, skull, scaphoid, metatarsal, metacarpal, phalanx, ilium, ischium, "
        "cuboid, zygoma"
    ),
    "an organ": (
        "liver, spleen, kidney, pancreas, stomach, gallbladder, colon, appendix, duodenum, heart, lung, brain, thyroid, "
        "bladder, uterus, ovary, prostate, esophagus, small intestine, thymus, adrenal gland, trachea, rectum, testis, "
        "skin, larynx, pituitary gland, eye"
    ),
    "a blood vessel": (
        "aorta, jugular vein, carotid artery, vena cava, portal vein, femoral artery, renal artery, pulmonary artery, "
        "coronary artery, subclavian vein, iliac artery, vertebral artery, saphenous vein, hepatic vein, brachial artery, "
        "splenic artery, radial artery, popliteal vein, capillary, arteriole, venule, azygos vein, basilar artery, "
        "mesenteric artery, tibial artery, cephalic vein, facial vein, celiac trunk"
    ),
    "an infection": (
        "pneumonia, tuberculosis, meningitis, hepatitis, malaria, influenza, measles, cholera, sepsis, osteomyelitis, "
        "encephalitis, endocarditis, bronchitis, tetanus, rabies, syphilis, chickenpox, typhoid, mumps, pertussis, "
        "tonsillitis, cellulitis, aspergillosis, toxoplasmosis, shingles, leprosy, scabies, cystitis"
    ),
    "a tumour": (
        "glioma, lymphoma, melanoma, sarcoma, meningioma, carcinoma, adenoma, lipoma, osteosarcoma, neuroblastoma, "
        "hemangioma, schwannoma, glioblastoma, astrocytoma, hepatoma, fibroma, chondrosarcoma, mesothelioma, seminoma, "
        "teratoma, leiomyoma, medulloblastoma, thymoma, insulinoma, papilloma, ependymoma, craniopharyngioma, osteoma"
    ),
}
TERMS: Mapping[str, Sequence[str]] = {kind: words.split(", ") for kind, words in _WORDS.items()}
"""Words by what they name."""

KINDS = tuple(kind.partition(" ")[2] for kind in TERMS)
FILES = ("written", "train", "test")


def question(word: str, kind: str) -> dict[str, Any]:
    """The row that asks for the kind of a word."""
    place = list(TERMS).index(kind)
    return {
        "id": word,
        "image": None,
        "question": f"What is the {word}?",
        "options": KINDS,
        "answer": LETTERS[place],
        "kind": KINDS[place],
    }


def written(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The row with a completion as a person would write it."""
    thought = f"The {row['id']} is {kind}."
    return {**row, "completion": f"<think>{thought}</think>\n<answer>{row['answer']}</answer>"}


def write_questions(folder: Path, *, written_rows: int, test_share: float = 0.3, seed: int = 0) -> dict[str, int]:
    """Write the three files, and return the number of rows of each.

    Args:
        folder: where they go.
        written_rows: rows with a completion, as many of each kind as can be.
        test_share: of each kind's words.
        seed: of the words' order.

    Raises:
        ValueError: if no words are left to train on.
    """
    most = sum(len(words) - round(test_share * len(words)) - 1 for words in TERMS.values())
    if not 0 <= written_rows <= most:
        raise ValueError(f"{written_rows} rows with a completion: give 0 to {most}, so that rows to train on are left")
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for place, (kind, words) in enumerate(TERMS.items()):
        drawn = [question(word, kind) for word in rng.sample(words, len(words))]
        tested = round(test_share * len(words))
        shown = tested + (written_rows + len(TERMS) - 1 - place) // len(TERMS)
        rows["test"] += drawn[:tested]
        rows["written"] += [written(row, kind) for row in drawn[tested:shown]]
        rows["train"] += drawn[shown:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in rows.items():
        rng.shuffle(entries)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries), encoding="utf-8")
    return {name: len(entries) for name, entries in rows.items()}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.text_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--written", type=int, default=20, help="rows with a completion (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        rows = write_questions(arguments.folder, written_rows=arguments.written, seed=arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    report(f"written to {arguments.folder}: {', '.join(f'{count} rows {name}' for name, count in rows.items())}")


if __name__ == "__main__":
    main()
