"""Run by test_remote_code.py in a process where hf_dspark cannot be imported: the draft comes with its own code."""

import sys
from importlib.abc import MetaPathFinder


class _Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_dspark":
            raise ImportError("hf_dspark is hidden")


sys.meta_path.insert(0, _Hidden())

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402


def main(target_folder: str, draft_folder: str, resaved: str) -> None:
    torch.set_num_threads(1)
    target = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    prompt = torch.arange(3, 12).unsqueeze(0)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = target.generate(prompt, **settings)
    draft = AutoModel.from_pretrained(draft_folder, trust_remote_code=True)
    assert draft.embed_tokens is None
    assert target.generate(prompt, assistant_model=draft, **settings).tolist() == expected.tolist()
    assert draft.last_stats.rounds > 0
    rounds = draft.last_stats.rounds
    output = target.generate(
        prompt, custom_generate=draft_folder, trust_remote_code=True, assistant_model=draft, **settings
    )
    assert output.tolist() == expected.tolist()
    draft.save_pretrained(resaved, include_code=True)
    again = AutoModel.from_pretrained(resaved, trust_remote_code=True)
    assert target.generate(prompt, assistant_model=again, **settings).tolist() == expected.tolist()
    assert again.last_stats.rounds == rounds
    assert not any(name.split(".")[0] == "hf_dspark" for name in sys.modules)
    print("equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
