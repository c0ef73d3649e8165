"""Make pairs of small models that were trained independently: an MLP, a ResNet, a ViT and a Llama, two of each.

    python samples/make_independent.py OUT    writes OUT/{mlp,resnet,vit,llama}/{a,b} and OUT/data, in minutes

docs/permutations.md aligns them.
"""

from __future__ import annotations

from pathlib import Path

from make.independent_models import KINDS, NAMES, write_data, write_model
from make.trainings import arguments, pool

_DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the training steps (1); less for a trial"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="default: all")
    given = parser.parse_args()
    write_data(given.out, _DOCUMENTS)
    with pool(given.processes) as trainings:
        made = [
            trainings.submit(write_model, kind, name, given.out, given.share)
            for kind in given.kinds
            for name in NAMES
        ]
        for one in made:
            print(one.result(), flush=True)


if __name__ == "__main__":
    main()
