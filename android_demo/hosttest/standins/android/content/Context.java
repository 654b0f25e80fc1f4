package android.content;

import android.os.PerformanceHintManager;
import android.os.PowerManager;

/** Gives the stand-ins of services. */
public class Context {
    public final PowerManager power = new PowerManager();
    public final PerformanceHintManager hints = new PerformanceHintManager();

    public final <T> T getSystemService(Class<T> service) {
        return service.cast(service == PowerManager.class ? power : hints);
    }
}
