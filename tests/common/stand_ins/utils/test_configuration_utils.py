"""Stand-in for a table that the source distribution leaves out: common fields at other values than their defaults."""

config_common_kwargs = {
    "architectures": ["JointMAEModel"],
    "dtype": "float16",
    "id2label": {0: "chair", 1: "table", 2: "lamp"},
    "label2id": {"chair": 0, "table": 1, "lamp": 2},
    "is_encoder_decoder": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
