// The live server, where there is one: `featureflow atlas serve` opens the page as /?token=…; from
// disk nothing is asked.

let token = "";

/** { model, limits, steering } or null. Makes no request unless the page came from a server with a
 *  token. */
export async function connect() {
  if (!location.protocol.startsWith("http")) return null;
  token = new URLSearchParams(location.search).get("token") ?? "";
  if (!token) return null;
  try {
    const answer = await fetch("api/health", { headers: { "X-Atlas-Token": token } });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** POST a JSON body; calls `online(object)` per line of the answer. Throws with the server's own
 *  sentence. */
export async function stream(path, body, online, signal) {
  const answer = await fetch(`api/${path}`, { method: "POST", headers: { "X-Atlas-Token": token,
    "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  if (answer.status === 429) throw new Error(
    "The model is busy with another request; try again when it is done.");
  if (!answer.ok) throw new Error(
    `The server refused (${answer.status}): ${(await answer.text()).slice(0, 300)}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line.trim()) handle(JSON.parse(line), online);
    if (done) return;
  }
}

function handle(record, online) {
  if (record.error) throw new Error(record.error);
  online(record);
}

export const cancel = () => fetch("api/cancel",
  { method: "POST", headers: { "X-Atlas-Token": token } }).catch(() => null);
