"""The network: cells, layers and models, with the devices and the kernels that compute them."""
