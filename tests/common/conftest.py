MARKERS = "generate", "order", "slow", "torch_compile_test", "is_training_test", "accelerate_tests", "bitsandbytes"


def pytest_configure(config):
    """Registers the markers that transformers' common tests carry."""
    for marker in (*MARKERS, "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test"):
        config.addinivalue_line("markers", f"{marker}: used by the common tests of transformers")
