"""Runs the demo, prints its tables and draws its pictures."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from trainax_pk.demo._advection import distance_to_upwind, learn_stencils
from trainax_pk.demo._kuramoto_sivashinsky import DT, Evaluation, train_emulator
from trainax_pk.demo._pictures import draw_errors, draw_rollout, draw_stencils

_LEADS = (1, 5, 10, 20, 30, 40, 60, 80, 100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Both trainings, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m trainax_pk.demo")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--small", action="store_true", help="a few updates only")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    print("1. Linear advection: a learned stencil of width 2, CFL -0.75\n")
    stencils = learn_stencils(num_training_steps=20 if options.small else 1000)
    print("   rollout steps   stencil             distance to upwind")
    for steps, stencil in stencils.items():
        weights = f"[{stencil[0]:.4f}, {stencil[1]:.4f}]"
        print(f"   {steps:>13}   {weights:<18}  {distance_to_upwind(stencil):.4f}")
    draw_stencils(stencils, options.output / "stencils.png")

    print("\n2. Kuramoto-Sivashinsky: a convolutional emulator, rollouts of 5 steps\n")
    scale = {"num_training_steps": 5, "num_samples": 2, "width": 4}
    evaluation = train_emulator(**scale if options.small else {})
    _report(evaluation)
    draw_rollout(evaluation, options.output / "rollout.png")
    draw_errors(evaluation, options.output / "errors.png")
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s; pictures: {options.output}/*.png")


def _report(evaluation: Evaluation) -> None:
    print(
        f"   {evaluation.num_parameters:,} parameters; program: {evaluation.program}\n"
    )
    print("   lead steps    time   nRMSE emulator   nRMSE persistence")
    for lead in _LEADS:
        own, held = evaluation.nrmse[lead - 1], evaluation.persistence[lead - 1]
        print(f"   {lead:>10}   {lead * DT:>5.1f}   {own:>14.4f}   {held:>17.4f}")


if __name__ == "__main__":
    main()
