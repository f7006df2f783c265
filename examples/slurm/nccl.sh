# shellcheck shell=bash
# Network settings, sourced by train.sbatch. What is set already is kept; most clusters need nothing here.

# Megatron overlaps communication of tensor parallelism with kernels in the order of their launch.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Say what NCCL chose only when something is wrong; INFO prints rings, interfaces and plugins.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Which interface: where nodes have several, name the one between them (ip -brief address).
#   export NCCL_SOCKET_IFNAME=eth0     bootstrap and, without InfiniBand, the data
#   export GLOO_SOCKET_IFNAME=eth0     gloo, which the CPU path and checkpoint planning use
# InfiniBand: name the adapters that carry training traffic, and leave out those of the storage network.
#   export NCCL_IB_HCA=mlx5_0,mlx5_1
# Sharp, tuner and plugin settings belong to the cluster's own documentation: copying another cluster's
# values is a common cause of slow or hanging runs.
