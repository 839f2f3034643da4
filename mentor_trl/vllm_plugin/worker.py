"""
The worker extension of a mixed-policy engine. Importing this module hooks the worker's process, so that an engine that
names the extension has the plugin wherever its workers run.
"""

from ..vllm_server.policy_worker import PolicyWorkerExtension
from .hooks import install_worker


install_worker()

MentorWorkerExtension = PolicyWorkerExtension
