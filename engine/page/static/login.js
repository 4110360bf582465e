import { chosenLanguage, setLanguage, translate } from "/static/words.js";

setLanguage(chosenLanguage());
translate(document);
document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = JSON.stringify({ password: document.getElementById("password").value });
  const answer = await fetch("/api/login", { method: "POST", body, headers: { "X-Report-Page": "1" } });
  if (answer.ok) location.replace("/");
  else document.getElementById("wrong").textContent = (await answer.json()).error;
});
