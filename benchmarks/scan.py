"""Time an RNN and an LSTM of H = 16 on a sequence of T = 256 inputs of E = 128, as in notebook 000."""

import statistics
import time

import torch

from charlm.config import ModelConfig
from charlm.nn.layers import make_recurrent

T, E, H = 256, 128, 16
ROUNDS = 20


def main():
    torch.manual_seed(10)
    x = torch.randn(1, T, E)
    stacks = {
        (cell, implementation): make_recurrent(
            E, ModelConfig(cell=cell, implementation=implementation, hidden_size=H)
        ).eval()
        for cell in ("rnn", "lstm")
        for implementation in ("scratch", "builtin")
    }
    for stack in stacks.values():
        for parameter in stack.parameters():
            torch.nn.init.normal_(parameter)
    times = {key: [] for key in stacks}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):  # the first one warms up
            for (cell, implementation), stack in stacks.items():
                state = tuple(torch.zeros(1, 1, H) for _ in range(2 if cell == "lstm" else 1))
                start = time.perf_counter()
                stack(x, state)
                if turn:
                    times[cell, implementation].append(1000 * (time.perf_counter() - start))
    print(f"T = {T}, E = {E}, H = {H}, forward, milliseconds, medians of {ROUNDS}\n")
    print("| | RNN | LSTM | LSTM / RNN |\n|---|---|---|---|")
    print("| notebook 000, NumPy | 6.88 | 29.52 | 4.29 |")
    for implementation in ("scratch", "builtin"):
        rnn, lstm = (statistics.median(times[cell, implementation]) for cell in ("rnn", "lstm"))
        print(f"| {implementation} | {rnn:.2f} | {lstm:.2f} | {lstm / rnn:.2f} |")


if __name__ == "__main__":
    main()
