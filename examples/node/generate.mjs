// Streams one answer of a kvmesh gateway: node generate.mjs [PROMPT] [HOST:PORT]
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const DEADLINE_MS = 60_000;
const [prompt = "In the beginning", address = "127.0.0.1:50051"] = process.argv.slice(2);
const root = fileURLToPath(new URL("../..", import.meta.url));
const protos = loadSync("protos/gateway.proto", { includeDirs: [root], oneofs: true });
const { GenerationService } = grpc.loadPackageDefinition(protos).kvmesh.v1;

const client = new GenerationService(address, grpc.credentials.createInsecure());
const request = { text: prompt, sampling: { temperature: 0.8, seed: 1 }, stopping: { maxNewTokens: 20 } };
process.stdout.write(prompt);
try {
  for await (const response of client.generate(request, { deadline: Date.now() + DEADLINE_MS })) {
    if (response.event === "delta") process.stdout.write(response.delta.text);
    if (response.event === "usage") console.log(`\n${response.usage.numOutputTokens} tokens`);
  }
} catch (error) {
  console.error(`\n${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
