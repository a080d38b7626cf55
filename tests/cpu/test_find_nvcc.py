"""tools/find_nvcc.py: which nvcc is taken where there are several."""

from tools import find_nvcc


def test_order(tmp_path, monkeypatch):
    def install(folder):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        return str(nvcc)

    monkeypatch.setattr(find_nvcc, "LOCAL", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nowhere" / "nvcc"))
    assert find_nvcc.find_nvcc() is None
    # Each takes precedence over all those installed before it.
    for folder in ("cuda-9.2/bin", "cuda-13.0/bin", "cuda-13.1/bin", "cuda/bin", "home/bin", "path", "nowhere"):
        nvcc = install(folder)
        assert find_nvcc.find_nvcc() == nvcc
