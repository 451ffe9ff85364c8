"""The program of the README: what she bought, before and after it is known what happened then.

    python examples/hello.py                                 # some seconds on a CPU
    python examples/hello.py --plot docs/images/hello.svg    # its picture, too

Few values are possible, so both posteriors are exact: nothing is drawn. In bfloat16, which is taken
where the machine is fast in it, the probabilities differ from those in float32 by a point or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lmppl
from lmppl import lm_sample

THINGS = [" knife.", " dog.", " pie.", " hat.", " lamp."]


def bought(then: str | None = None) -> lmppl.Text:
    """What she bought at the market, and the sentence after it, if it is known."""
    x = "At the market she bought a"
    z = lm_sample("z", x, choices=THINGS)
    if then:
        lm_sample("then", [x, z], obs=then)
    return z


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="any causal LM")
    parser.add_argument("--then", default=" It barked all the way home.", help="what happened then")
    parser.add_argument("--plot", type=Path, help="a file for the picture (PNG, SVG, PDF)")
    args = parser.parse_args(argv)
    lm = lmppl.LM.from_pretrained(args.model)
    prior = lmppl.infer(bought, lm=lm, method="exact")
    posterior = lmppl.infer(bought, args.then, lm=lm, method="exact")
    print(posterior)
    if args.plot is not None:
        posterior.plot("z", prior=prior, path=args.plot)


if __name__ == "__main__":
    main()
