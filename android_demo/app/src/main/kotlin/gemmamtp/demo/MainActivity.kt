package gemmamtp.demo

import android.app.Activity
import android.app.AlertDialog
import android.content.ActivityNotFoundException
import android.content.Context
import android.content.Intent
import android.os.Build
import android.os.Bundle
import android.view.View
import android.view.inputmethod.InputMethodManager
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ProgressBar
import android.widget.RadioGroup
import android.widget.ScrollView
import android.widget.TextView
import android.widget.Toast

private const val PICK_FOLDER = 1
private const val ASK_NOTIFICATIONS = 2
private const val POST_NOTIFICATIONS = "android.permission.POST_NOTIFICATIONS"

/** Shows the session's screen and passes taps on; its only state is what is being typed. */
class MainActivity : Activity() {
    private val app get() = application as DemoApp
    private val session get() = app.session
    private val bundle by lazy { findViewById(R.id.bundle) as Button }
    private val newChat by lazy { findViewById(R.id.new_chat) as View }
    private val benchmark by lazy { findViewById(R.id.benchmark) as View }
    private val settings by lazy { findViewById(R.id.settings) as View }
    private val drafting by lazy { findViewById(R.id.drafting) as RadioGroup }
    private val status by lazy { findViewById(R.id.status) as TextView }
    private val reopen by lazy { findViewById(R.id.reopen) as Button }
    private val progress by lazy { findViewById(R.id.progress) as ProgressBar }
    private val transcript by lazy { findViewById(R.id.transcript) as ScrollView }
    private val talk by lazy { findViewById(R.id.talk) as LinearLayout }
    private val prompt by lazy { findViewById(R.id.prompt) as EditText }
    private val send by lazy { findViewById(R.id.send) as Button }
    private val screenText by lazy { ScreenText(this) }
    private var dialog: AlertDialog? = null
    private var followsEnd = true

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        setContentView(R.layout.main)
        bundle.setOnClickListener { chooseBundle() }
        newChat.setOnClickListener { session.newChat() }
        settings.setOnClickListener { dialog = settingsDialog(this, session) }
        benchmark.setOnClickListener { typed()?.let(session::benchmark) }
        reopen.setOnClickListener { session.reopen() }
        send.setOnClickListener { if (session.screen.busy) session.stop() else ask() }
        drafting.check(BUTTONS.getValue(session.screen.drafting))
        drafting.setOnCheckedChangeListener { _, id -> session.draft(BUTTONS.entries.first { it.value == id }.key) }
        transcript.setOnScrollChangeListener { _, _, _, _, _ -> followsEnd = !transcript.canScrollVertically(1) }
        transcript.addOnLayoutChangeListener { _, _, _, _, _, _, _, _, _ ->
            if (followsEnd) transcript.scrollTo(0, talk.height)
        }
    }

    override fun onStart() {
        super.onStart()
        app.attach(::show)
    }

    override fun onStop() {
        super.onStop()
        app.detach()
        if (!isChangingConfigurations) session.background()
    }

    override fun onDestroy() {
        super.onDestroy()
        dialog?.dismiss()
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val folder = data?.data
        if (request == PICK_FOLDER && result == RESULT_OK && folder != null) {
            session.install(TreeSource(applicationContext.contentResolver, folder))
        }
    }

    private fun show(screen: Screen) {
        bundle.text = screen.bundle ?: getString(R.string.choose_bundle)
        bundle.isEnabled = !screen.busy
        newChat.isEnabled = !screen.busy && screen.talk.isNotEmpty()
        benchmark.isEnabled = screen.ready
        send.setText(if (screen.busy) R.string.stop else R.string.send)
        send.isEnabled = screen.busy || screen.ready
        prompt.setHint(if (screen.ready && !screen.chats) R.string.text_hint else R.string.prompt_hint)
        set(status, screenText.status(screen))
        val color = if (screen.problem == null) R.color.text_secondary else R.color.error
        status.setTextColor(getColor(color))
        transcript.keepScreenOn = screen.busy // else the display turns off in a long benchmark, which ends it
        reopen.visibility = visible(screen.canReopen)
        reopen.setText(if (screen.problem is Problem.MemoryShort) R.string.open_anyway else R.string.open_again)
        showWork(screen)
        for ((id, value) in screenText.counts(screen.counts)) set(findViewById(id) as TextView, value)
        showTalk(screen.talk)
    }

    private fun showWork(screen: Screen) {
        val work = screen.work
        val known = work != null && work.total > 0
        progress.visibility = visible(screen.busy && screen.phase != Phase.WRITING)
        progress.isIndeterminate = !known
        if (work != null && known) progress.progress = (progress.max * work.done / work.total).toInt()
    }

    /** Append to thoughts and answers, which only grow, so that a selection in them stays. */
    private fun showTalk(exchanges: List<Exchange>) {
        if (talk.childCount > exchanges.size) talk.removeAllViews()
        while (talk.childCount < exchanges.size) layoutInflater.inflate(R.layout.exchange, talk)
        for ((i, exchange) in exchanges.withIndex()) {
            val row = talk.getChildAt(i)
            set(row.findViewById(R.id.asked) as TextView, exchange.prompt)
            val thought = row.findViewById(R.id.thought) as TextView
            thought.visibility = visible(exchange.thought.isNotEmpty())
            grow(thought, exchange.thought)
            grow(row.findViewById(R.id.answer) as TextView, exchange.answer)
        }
    }

    private fun grow(view: TextView, text: String) {
        if (!text.startsWith(view.text)) view.text = text
        else if (text.length > view.text.length) view.append(text.substring(view.text.length))
    }

    /** Set a text if it differs: setting it again would make a screen reader announce it again. */
    private fun set(view: TextView, text: String) {
        if (view.text.toString() != text) view.text = text
    }

    private fun visible(yes: Boolean) = if (yes) View.VISIBLE else View.GONE

    /** The prompt; null, and a message to the user, if there is none. */
    private fun typed(): String? {
        val text = prompt.text.toString()
        if (text.isNotBlank()) return text
        Toast.makeText(this, R.string.prompt_missing, Toast.LENGTH_SHORT).show()
        return null
    }

    private fun ask() {
        val text = typed() ?: return
        if (!session.send(text)) return
        prompt.text.clear()
        followsEnd = true
        val keyboard = getSystemService(Context.INPUT_METHOD_SERVICE) as InputMethodManager
        keyboard.hideSoftInputFromWindow(prompt.windowToken, 0)
    }

    private fun chooseBundle() {
        val carried = AssetSource(applicationContext.assets, getString(R.string.built_in))
        val onDevice = app.bundles.list().filter { it.name != carried.name }
        val choices = ArrayList<Pair<String, () -> Unit>>()
        if (carried.exists) choices.add(carried.name to { session.install(carried) })
        onDevice.mapTo(choices) { it.name to { session.open(it) } }
        choices.add(getString(R.string.pick_folder) to ::pickFolder)
        choices.add(getString(R.string.download) to { dialog = downloadDialog(this, ::download) })
        dialog = AlertDialog.Builder(this)
            .setTitle(R.string.choose_bundle)
            .setItems(choices.map { it.first }.toTypedArray()) { _, which -> choices[which].second() }
            .setNegativeButton(R.string.cancel, null)
            .show()
    }

    private fun download(download: Download) {
        // Without it the download runs as well, and the system shows no notification.
        if (Build.VERSION.SDK_INT >= 33) requestPermissions(arrayOf(POST_NOTIFICATIONS), ASK_NOTIFICATIONS)
        startDownload(applicationContext, download)
        Toast.makeText(this, R.string.download_waits, Toast.LENGTH_LONG).show()
    }

    private fun pickFolder() {
        try {
            startActivityForResult(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK_FOLDER)
        } catch (_: ActivityNotFoundException) {
            Toast.makeText(this, R.string.no_picker, Toast.LENGTH_LONG).show()
        }
    }

    private companion object {
        val BUTTONS = mapOf(
            Drafting.OFF to R.id.drafting_off, Drafting.ON to R.id.drafting_on, Drafting.AUTO to R.id.drafting_auto,
        )
    }
}
