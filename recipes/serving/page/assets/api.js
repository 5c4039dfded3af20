// The server's routes, and what a person is told when one of them refuses.

export class Problem extends Error {}

export async function state() {
  return (await call("state", { method: "GET" })).json();
}

export function post(path, body, signal) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

// The JSON of each server-sent event, until the stream ends.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(sentence(event.error.message));
      yield event;
    }
  }
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server did not answer. Is it running, and is the picture not too large?");
  }
  if (response.ok) return response;
  throw new Problem(await reason(response));
}

async function reason(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = `the server answered ${response.status}`;
  }
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) return `The server is busy. Try again in ${wait ?? "a few"} s.`;
  return sentence(message);
}

function sentence(text) {
  const shown = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(shown) ? shown : `${shown}.`;
}
