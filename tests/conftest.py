"""What every test shares. Imports nothing of jax, so that the host wing's tests start in milliseconds."""

import os

# Eight devices where there is no accelerator, so that every mesh of up to eight runs on one CPU. XLA reads this once,
# when its first client is made, hence here and not in a fixture. A GPU or TPU machine is not affected by it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
