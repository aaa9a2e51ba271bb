// A job from its input to its result through the official npm SDK; prints what was seen as JSON.
// node whole_way.mjs GRAPH PHOTO FOLDER, with COMFY_BASE_URL in the environment.
import { Comfy } from "@comfyorg/sdk";
import { join } from "node:path";

const [graph, photo, folder] = process.argv.slice(2);
const client = new Comfy();

const refusal = async (promise) => {
  try {
    await promise;
  } catch (error) {
    return { name: error.constructor.name, code: error.code, status: error.httpStatus ?? null };
  }
  return null;
};

const first = client.assets.fromFile(photo);
await first.commit();
const second = client.assets.fromFile(photo);
await second.commit();

const workflow = await client.workflows.fromFile(graph);
workflow.setInput("1", "image", second);
const idempotencyKey = crypto.randomUUID();
const submitted = await client.submit(workflow, { idempotencyKey });
const reuse = await refusal(client.submit(workflow, { idempotencyKey }));

const seen = { statuses: [], values: [], previews: [], outputs: [], order: [] };
for await (const event of submitted.events()) {
  seen.order.push(event.kind);
  if (event.kind === "statusChange") seen.statuses.push(event.status);
  if (event.kind === "progress") seen.values.push(event.value);
  if (event.kind === "preview") seen.previews.push(event.contentType);
  if (event.kind === "outputReady") seen.outputs.push(event.output.id);
}

const job = await (await client.jobs.get(submitted.id)).result();
const [output] = job.getOutputs("9");
await output.toFile(join(folder, "whole.png"));
const start = await output.toBytes({ range: [0, 3] });
const { url } = await output.getDownloadUrl();
const executed = await job.getWorkflow();

const failing = client.workflows.fromJson({
  1: {
    class_type: "RegexReplace",
    inputs: {
      string: idempotencyKey,
      regex_pattern: "(unclosed",
      replace: "x",
      case_insensitive: true,
      multiline: false,
      dotall: false,
      count: 0,
    },
  },
  9: { class_type: "PreviewAny", inputs: { source: ["1", 0] } },
});
let failure = null;
try {
  await client.run(failing);
} catch (error) {
  failure = { name: error.constructor.name, node: error.error?.node_id, class: error.error?.class_type };
}

const chained = await client.workflows.fromFile(graph);
chained.setInput("1", "image", await client.assets.get(output.id));
await (await client.run(chained)).getOutputs("9")[0].toFile(join(folder, "twice.png"));

const unknown = await refusal(client.jobs.get(crypto.randomUUID()));
const invalid = await refusal(client.submit(client.workflows.fromJson({ 1: { class_type: "NoSuchClass", inputs: {} } })));
const secondId = second.id;
await second.delete();
const deleted = await refusal(client.assets.get(secondId));

console.log(
  JSON.stringify({
    created: [first.createdNew, second.createdNew],
    job: job.id,
    status: job.status,
    output: { id: output.id, size: output.sizeBytes, type: output.type, contentType: output.contentType },
    start: Buffer.from(start).toString("latin1"),
    url,
    format: executed.format,
    canceled: (await job.cancel()).status,
    events: seen,
    reuse,
    failure,
    unknown,
    invalid,
    deleted,
  }),
);
