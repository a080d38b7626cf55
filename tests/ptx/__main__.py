"""Runs pytest with the CUDA kernels, and Triton's if asked, in the emulator.

Usage: python -m tests.ptx 80|90a|120 [--triton] [--seed N] [--mapped] [--traffic] PYTEST ARGUMENT ...
"""

import argparse
import sys

from tests.ptx import build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("arch")
parser.add_argument("--triton", action="store_true", help="Triton's kernels too")
parser.add_argument("--seed", type=int, help="of a random order")
parser.add_argument("--mapped", action="store_true", help="kernels may use memory that is no tensor's: whole engines")
parser.add_argument("--traffic", action="store_true", help="prints what the kernels asked of memory, at the end")
args, more = parser.parse_known_args()
how = dict(triton=args.triton, seed=args.seed, mapped=args.mapped, traffic=args.traffic)
sys.exit(build.pytest_process(args.arch, *more, **how).returncode)
