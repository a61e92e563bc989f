"""What large models need on two T4s, without a GPU: `make test-fake-gpu`."""
