"""The maths of Lyra worlds in plain torch. Nothing here imports the host, except the package `models`."""
