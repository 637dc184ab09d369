// An agent of AG-UI: runs, or joins what runs, and prints each event, then its messages and its state.
//   node ag_ui_agent.mjs URL MESSAGES
import { HttpAgent } from '@ag-ui/client';

const [, , url, messages] = process.argv;
const say = (value) => console.log(JSON.stringify(value));
const agent = new HttpAgent({ url, threadId: 't', initialMessages: JSON.parse(messages) });
let error = null;
try {
  await agent.runAgent({ runId: 'r' }, { onEvent: ({ event }) => say({ event }) });
} catch (each) {
  error = each.message;
}
say({ messages: agent.messages, state: agent.state, error });
