"""Import: python tools/import_checkpoint.py SOURCE.pt --out FOLDER [--sample-rate 16000] [--quantizer mu-law-minmax].

Turns a checkpoint of the original SaShiMi code, or of another that `sashimi.foreign.importer` knows, into a model
folder, which sampling and evaluation take; training too (--init-from) if the model is stable by construction.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sashimi.audio import AudioConfig, QuantizerName
from sashimi.distributed import run_command
from sashimi.errors import InputError
from sashimi.foreign.importer import import_checkpoint
from sashimi.foreign.translation import Imported
from sashimi.model_folder import save_model
from sashimi.parsing import parse, to_dict


@dataclass(frozen=True)
class ImportConfig:
    """From a checkpoint of other code to a model folder. What its tensors do not tell is told here."""

    source: str
    """File written by torch.save; it is read without running any code in it."""
    out: str = ""
    """Model folder to write."""
    sample_rate: int = 16000
    """Samples per second (Hz) of the audio that the model was trained on."""
    quantizer: QuantizerName | None = None
    """How that audio became levels; left out: what the recognized code does by default."""
    dt_transform: Literal["softplus", "exp"] = "softplus"
    """Version 4 of the original only: how the run mapped inv_dt to dt (dt_transform in its config)."""


def main() -> None:
    """Read, recognize, translate, write, say what was found."""
    arguments = parse(ImportConfig, sys.argv[1:], "import_checkpoint.py", __doc__)
    if not arguments.out:
        raise InputError("--out is missing: name the model folder to write")
    source, out = Path(arguments.source), Path(arguments.out)
    imported = import_checkpoint(source, arguments.dt_transform)
    audio = audio_config(imported, arguments)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    record = {"file": source.name, "sha256": digest, "origin": imported.origin, "notes": list(imported.notes)}
    save_model(out, imported.tensors, to_dict(imported.config), to_dict(audio), record, imported.format)
    for line in (
        f"found: {imported.origin}",
        f"model: {imported.architecture()}",
        f"audio: {audio.sample_rate} Hz, {audio.quantizer}, {audio.bits} bits (the tensors tell the bits only)",
        *(f"note:  {note}" for note in imported.notes),
        f"wrote: {out}, format {imported.format}{'' if imported.format == 'sashimi' else ', for inference only'}",
    ):
        print(line)


def audio_config(imported: Imported, arguments: ImportConfig) -> AudioConfig:
    """The number of levels is known, the rest is told or assumed."""
    levels = imported.config.levels
    if levels & (levels - 1):
        raise InputError(f"{arguments.source}: its {levels} levels are no power of two, so not 8 to 16 bits a sample")
    default: QuantizerName = "mu-law" if imported.format == "seed796" else "mu-law-minmax"
    return AudioConfig(arguments.sample_rate, arguments.quantizer or default, levels.bit_length() - 1)


if __name__ == "__main__":
    run_command(main)
