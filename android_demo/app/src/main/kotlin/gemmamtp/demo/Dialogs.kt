package gemmamtp.demo

import android.app.Activity
import android.app.AlertDialog
import android.view.View
import android.widget.EditText
import android.widget.Switch
import android.widget.TextView

/** Show what holds for the next answers, and let it be changed. */
fun settingsDialog(activity: Activity, session: Session): AlertDialog {
    val view = activity.layoutInflater.inflate(R.layout.settings, null)
    val system = view.findViewById(R.id.system) as EditText
    val thinking = view.findViewById(R.id.thinking) as Switch
    val note = view.findViewById(R.id.not_supported) as TextView
    val screen = session.screen
    system.setText(screen.system)
    thinking.isChecked = screen.thinking
    note.setText(if (screen.chats) R.string.no_thinking else R.string.no_chats)
    note.visibility = if (screen.ready && !screen.thinks) View.VISIBLE else View.GONE
    return AlertDialog.Builder(activity)
        .setTitle(R.string.settings)
        .setView(view)
        .setPositiveButton(R.string.ok) { _, _ ->
            session.instruct(system.text.toString())
            session.think(thinking.isChecked)
        }
        .setNegativeButton(R.string.cancel, null)
        .show()
}

/** Ask for a bundle to download, beginning with the last one; [start] is called with it. */
fun downloadDialog(activity: Activity, start: (Download) -> Unit): AlertDialog {
    val view = activity.layoutInflater.inflate(R.layout.download, null)
    val url = view.findViewById(R.id.url) as EditText
    val digest = view.findViewById(R.id.digest) as EditText
    lastDownload(activity).let {
        url.setText(it.url)
        digest.setText(it.digest)
    }
    return AlertDialog.Builder(activity)
        .setTitle(R.string.download_title)
        .setView(view)
        .setPositiveButton(R.string.download_start) { _, _ -> start(Download(url.text.toString(), digest.text.toString())) }
        .setNegativeButton(R.string.cancel, null)
        .show()
}
