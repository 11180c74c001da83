// Fills in the token of the link. It stands after "#", so that no server and no other page ever sees it.
const field = document.querySelector('input[name="token"]');
const token = new URLSearchParams(location.hash.slice(1)).get("token");
if (field && token) {
  field.value = token;
  history.replaceState(null, "", location.pathname);
}
if (field && field.value) field.closest(".token").hidden = true;
