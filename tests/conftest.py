"""What every folder of tests shares; fixtures live in the folders that use them."""

pytest_plugins = ("tests.needs", "tests.loopback", "pytester")
