"""The compiled CPU kernels: C sources, and how they are built and called."""
