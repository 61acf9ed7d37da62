// The gRPC service from Node, with no stubs but the .proto file: node scripts/grpc_client.mjs 127.0.0.1:50051 PROTOS
// Needs `@grpc/grpc-js` and `@grpc/proto-loader` where node finds them; scripts/check_http.py installs them and runs this.
import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [target, protos] = process.argv.slice(2);
const definition = loader.loadSync("jaxserve/v1/inference.proto", { keepCase: true, includeDirs: [protos] });
const { Inference } = grpc.loadPackageDefinition(definition).jaxserve.v1;
const client = new Inference(target, grpc.credentials.createInsecure());
const generate = (request) => client.Generate({ text: "1 2 3", ...request });

const ids = [];
for await (const chunk of generate({ sampling: { max_tokens: 8, temperature: 0 } })) ids.push(...chunk.token_ids);
assert.equal(ids.length, 8);

const left = generate({ sampling: { max_tokens: 64 } });
for await (const chunk of left) {
  assert.ok(chunk.request_id);
  break; // cancels the call
}

await assert.rejects(
  async () => {
    for await (const _ of generate({ sampling: { temperature: -1 } })) assert.fail("it is refused");
  },
  (error) => {
    assert.equal(error.code, grpc.status.INVALID_ARGUMENT);
    assert.match(error.details, /^temperature: /);
    return true;
  },
);
client.close();
console.log(`ok: ${ids}`);
