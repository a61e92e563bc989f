"""GPTQ: the quantiser of 4 and 8 bits, and the environment that it runs in."""
