"""Versions of the other tools that are measured: those that the extra `peers` installs."""

VERSIONS = {
    "deltatensors": "0.2.0",
    "mergekit": "0.1.5",
    "peft": "0.21.2",
    "sparse-llm": "0.0.5",
    "zipnn": "0.5.4",
    "zstandard": "0.25.0",
}
